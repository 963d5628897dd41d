"""Images that decoders accept although their format forbids it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vkd_jax.data.images import open_image
from vkd_jax.types import UserError


def png(width, height, lines, *, bits=8, color=2, interlaced=0, chunks=(), parts=1):
    """A PNG with the given lines of pixels, each after the byte of its filter, in some IDAT chunks."""
    data = zlib.compress(lines)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    data = [data[i * len(data) // parts : (i + 1) * len(data) // parts] for i in range(parts)]
    chunks = [(b"IHDR", header), *chunks, *((b"IDAT", part) for part in data), (b"IEND", b"")]
    encoded = (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


def rows(width, height, value=200):
    return (b"\0" + bytes([value]) * (3 * width)) * height


def test_a_whole_png_is_read():
    for parts in (1, 3):
        image = open_image(png(4, 6, rows(4, 6), parts=parts))
        assert np.asarray(image).shape == (6, 4, 3) and (np.asarray(image) == 200).all()


@pytest.mark.parametrize(("height", "share"), [(3, 50), (0, 0), (5, 83)])
def test_a_png_that_ends_after_some_rows_is_refused(height, share):
    """Its stream, checksums and end are right; the decoder would leave the other rows black."""
    with pytest.raises(UserError, match=f"the image is truncated: its PNG has {share} % of the pixels"):
        open_image(png(4, 6, rows(4, height)))


@pytest.mark.parametrize(
    ("width", "height", "bits", "color", "size"),
    [(9, 2, 1, 0, 2 * 3), (3, 2, 4, 0, 2 * 3), (2, 2, 16, 0, 2 * 5), (2, 2, 8, 4, 2 * 5), (2, 2, 8, 6, 2 * 9)],
)
def test_the_size_of_a_line_by_hand(width, height, bits, color, size):
    """One byte for the filter, and the bits of all pixels, rounded up."""
    open_image(png(width, height, (b"\0" + b"\xf0" * (size // 2 - 1)) * 2, bits=bits, color=color))
    with pytest.raises(UserError, match="is truncated"):
        open_image(png(width, height, b"\0" + b"\xf0" * (size // 2 - 1), bits=bits, color=color))


def test_the_passes_of_an_interlaced_png_by_hand():
    """Of 3 x 3 pixels, the passes have 1, 0, 0, 1, 2, 2 and 3 pixels, in 1, 0, 0, 1, 1, 2 and 1 lines."""
    lines = b"\0a" + b"\0b" + b"\0cd" + b"\0e" + b"\0f" + b"\0ghi"
    image = np.asarray(open_image(png(3, 3, lines, color=0, interlaced=1)))
    assert bytes(image.ravel()) == b"aeb" + b"ghi" + b"cfd"
    with pytest.raises(UserError, match="its PNG has 73 % of the pixels"):
        open_image(png(3, 3, lines[:-4], color=0, interlaced=1))


@pytest.mark.parametrize("lost", [1 / 2, 9 / 10])
def test_a_png_whose_end_was_lost_is_refused(lost):
    """Zeros, as of a lost block of a disk, decode as pixels; Pillow does not miss an end that is cut off."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(stream, "PNG")
    data, kept = stream.getvalue(), round(lost * len(stream.getvalue()))
    with pytest.raises(UserError, match="a checksum of its PNG is wrong"):
        open_image(data[:kept] + bytes(len(data) - kept))
    changed = bytearray(data)
    changed[kept] ^= 1
    with pytest.raises(UserError, match="a checksum of its PNG is wrong"):
        open_image(bytes(changed))
    for end in (data[:-12], data[:-1], data[:kept]):
        with pytest.raises(UserError, match="the image is truncated: its PNG has no end"):
            open_image(end)
    assert open_image(data + b"more").size == (50, 40)


@pytest.mark.parametrize("format", ["TIFF", "PPM"])
def test_an_open_image_of_another_format_is_refused(format):
    stream = io.BytesIO()
    Image.new("RGB", (9, 9)).save(stream, format)
    opened = Image.open(stream)
    with pytest.raises(UserError, match=f"the image is {format}; save it as PNG, JPEG, WebP, BMP or GIF"):
        open_image(opened)
    assert open_image(opened.convert("RGB")).size == (9, 9)


def test_modes_without_a_known_range_are_refused():
    for mode in ("I", "F", "LAB"):
        with pytest.raises(UserError, match=f"pixels of the mode {mode}; save it as RGB with 8 bits per channel"):
            open_image(Image.new(mode, (9, 9)))


def test_a_palette_is_there():
    palette = (b"PLTE", bytes(range(6)))
    assert open_image(png(2, 1, b"\0\0\1", color=3, chunks=[palette])).convert("RGB").getpixel((1, 0)) == (3, 4, 5)
    with pytest.raises(UserError, match="its PNG has no palette, and needs one"):
        open_image(png(2, 1, b"\0\0\1", color=3))


def test_a_jpeg_has_no_zero_in_a_quantization_table():
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(stream, format="JPEG")
    data = bytearray(stream.getvalue())
    open_image(bytes(data))
    table = data.index(b"\xff\xdb") + 5
    data[table : table + 64] = bytes(64)
    with pytest.raises(UserError, match="a quantization table of its JPEG has a zero"):
        open_image(bytes(data))
