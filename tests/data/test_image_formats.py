"""Images that decoders accept although their format forbids it."""

import io
import struct
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from vkd_jax.data import image_formats
from vkd_jax.data.images import open_image
from vkd_jax.types import UserError


def png(width, height, lines, *, bits=8, color=2, interlaced=0, chunks=(), parts=1):
    """A PNG with the given lines of pixels, each after the byte of its filter, in some IDAT chunks."""
    data = zlib.compress(lines)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    data = [data[i * len(data) // parts : (i + 1) * len(data) // parts] for i in range(parts)]
    return of_chunks((b"IHDR", header), *chunks, *((b"IDAT", part) for part in data), (b"IEND", b""))


def of_chunks(*chunks):
    """A PNG with the given names and contents of chunks."""
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


HEADER, HALF = (struct.pack(">IIBBBBB", 4, height, 8, 3, 0, 0, 0) for height in (2, 1))
COLORS, END = (b"PLTE", bytes(range(30))), (b"IEND", b"")
PIXELS = b"IDAT", zlib.compress((b"\0" + bytes([1, 5, 9, 2])) * 2)


def test_the_colors_of_a_palette_by_hand():
    """Chunks whose names do not begin with a capital may stand anywhere."""
    image = open_image(of_chunks((b"IHDR", HEADER), (b"tEXt", b"a\0b"), COLORS, (b"abCd", b""), PIXELS, END))
    assert np.asarray(image.convert("RGB"))[1, 2].tolist() == [27, 28, 29]


@pytest.mark.parametrize(
    "chunks",
    [
        ((b"IHDR", HALF), (b"IHDR", HEADER), COLORS, PIXELS, END),
        ((b"IHDR", HEADER), PIXELS, COLORS, END),
        ((b"IHDR", HEADER), COLORS, COLORS, PIXELS, END),
        ((b"IHDR", HEADER), COLORS, PIXELS, (b"IHDR", HALF), END),
        ((b"IHDR", HEADER), COLORS, (b"NEWS", b""), PIXELS, END),
        (COLORS, (b"IHDR", HEADER), PIXELS, END),
        ((b"IHDR", HEADER), COLORS, END),
    ],
)
def test_a_png_whose_chunks_are_not_in_the_order_of_its_format_is_refused(chunks):
    with pytest.raises(UserError, match="the image"):
        open_image(of_chunks(*chunks))
    with pytest.raises(UserError, match="a chunk that is unknown, repeated or not in its place"):
        image_formats.check(types.SimpleNamespace(format="PNG"), of_chunks(*chunks))


def test_a_png_with_more_rows_than_its_header_says_is_refused():
    with pytest.raises(UserError, match="its PNG has more pixels than its size"):
        open_image(png(4, 3, rows(4, 4)))


def test_pixels_of_colors_that_a_palette_lacks_are_refused():
    chunks = (b"IHDR", HEADER), (b"PLTE", bytes(range(27))), PIXELS, END
    with pytest.raises(UserError, match="its PNG has pixels of more colors than its palette of 9"):
        open_image(of_chunks(*chunks))


def test_a_gif_without_colors_is_refused():
    stream = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("P").save(stream, "GIF", comment=b"x" * 300)
    data = bytearray(stream.getvalue())
    assert open_image(bytes(data)).size == (4, 3) and data[10] & 128
    size = 3 << 1 + (data[10] & 7)
    data[10] &= 127
    with pytest.raises(UserError, match="its GIF has no table of colors"):
        open_image(bytes(data[:13] + data[13 + size :]))
    start = data.index(b",", 13 + size)  # the image, which may have a table of its own
    own = data[:13] + data[13 + size : start + 9] + bytes([128 | size.bit_length() - 3]) + data[13 : 13 + size]
    assert open_image(bytes(own + data[start + 10 :])).size == (4, 3)


def test_pixels_of_colors_that_a_gif_lacks_are_refused():
    stream = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).quantize(16).save(stream, "GIF")
    data = stream.getvalue()
    assert data[10] & 7 == 3 and open_image(data).mode == "P"
    with pytest.raises(UserError, match="its GIF has pixels of more colors than its palette of 4"):
        open_image(data[:10] + bytes([data[10] & ~7 | 1]) + data[11 : 13 + 12] + data[13 + 48 :])


def bmp(pixels, colors=0, start=None):
    """A BMP of a row of four pixels with 8 bits, and a palette of some colors."""
    palette = b"".join(bytes([i, 2 * i, 3 * i, 0]) for i in range(colors))
    start = 54 + len(palette) if start is None else start
    file = struct.pack("<IHHI", 54 + len(palette) + len(pixels), 0, 0, start)
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, 0, len(pixels), 0, 0, colors, 0)
    return b"BM" + file + header + palette + bytes(pixels)


def test_pixels_of_colors_that_a_bmp_lacks_are_refused():
    for start in (None, 54):  # 54: where the palette begins
        image = open_image(bmp([1, 2, 3, 15], 16, start)).convert("RGB")
        assert [image.getpixel((x, 0)) for x in (1, 3)] == [(6, 4, 2), (45, 30, 15)]
    with pytest.raises(UserError, match="its BMP has pixels of more colors than its palette of 16"):
        open_image(bmp([1, 2, 3, 16], 16))
    with pytest.raises(
        UserError, match="its BMP has pixels of more colors than its palette of 15|more pixels than its size"
    ):
        open_image(bmp([1, 2, 3, 15], 16, start=54 + 15 * 4))
    with pytest.raises(UserError, match="the pixels of its BMP begin within its header"):
        open_image(bmp([1, 2, 3, 15], 16, start=14))


@pytest.mark.parametrize("change", [(10, 1), (11, 1), (12, 2), (12, 255)])
def test_a_png_header_has_only_methods_of_its_format(change):
    header = bytearray(struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    header[change[0]] = change[1]
    chunks = (b"IHDR", bytes(header)), (b"IDAT", zlib.compress(b"\0\x80")), END
    with pytest.raises(UserError, match="a header that its format forbids"):
        image_formats.check(types.SimpleNamespace(format="PNG"), of_chunks(*chunks))


def test_a_flood_of_chunks_is_refused(monkeypatch):
    monkeypatch.setattr(image_formats, "MOST_CHUNKS", 4)
    open_image(png(4, 6, rows(4, 6), parts=2))
    with pytest.raises(UserError, match="its PNG has more than 4 chunks"):
        open_image(png(4, 6, rows(4, 6), parts=3))


@pytest.mark.parametrize(
    ("header", "chunks"),
    [
        ((8, 0, 0, 0, 0), [COLORS]),
        ((8, 3, 0, 0, 0), [(b"PLTE", bytes(31))]),
        ((8, 3, 1, 0, 0), [COLORS]),
        ((8, 3, 0, 0, 2), [COLORS]),
        ((8, 3, 0, 0, 0, 0), [COLORS]),
    ],
)
def test_a_png_whose_header_and_palette_its_format_forbids_is_refused(header, chunks):
    """Pillow shows the numbers of colors as gray levels if the header says that there are no colors."""
    with pytest.raises(UserError, match="its PNG has a header that its format|a palette that does not fit its header"):
        open_image(of_chunks((b"IHDR", struct.pack(">II", 4, 2) + bytes(header)), *chunks, PIXELS, END))


def saved(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return bytearray(stream.getvalue())


def numbered(colors):
    """An image of 16 x 16 pixels with the numbers of so many colors."""
    image = Image.fromarray((np.arange(256) % colors).astype(np.uint8).reshape(16, 16), "L").convert("P")
    image.putpalette([(7 * i + 5 * channel) % 256 for i in range(colors) for channel in range(3)])
    return image


def gif(frames=1, interlace=0):
    """A GIF with 256 colors, and the position of its first image."""
    others = [numbered(200).rotate(90 * i) for i in range(1, frames)]
    options = {"save_all": True, "append_images": others} if others else {}
    data = saved(numbered(200), "GIF", comment=b"x" * 300, interlace=interlace, **options)
    return data, data.index(b",\0\0\0\0\x10\0\x10\0", 13 + 768)


@pytest.mark.parametrize(("frames", "interlace"), [(1, 0), (1, 1), (3, 0)])
def test_the_pixels_of_a_gif_are_as_many_as_its_size(frames, interlace):
    data, start = gif(frames, interlace)
    expected = np.asarray(numbered(200).convert("RGB"))
    assert (np.asarray(open_image(bytes(data)).convert("RGB")) == expected).all()
    for height, problem in ((8, "has more pixels than its size"), (17, "has fewer pixels than its size")):
        data[8:10] = data[start + 7 : start + 9] = struct.pack("<H", height)
        with pytest.raises(UserError, match=f"its GIF {problem}"):
            open_image(bytes(data))
    data[start + 7] = 16
    with pytest.raises(UserError, match="a GIF whose first image has another area than the whole; save it as PNG"):
        open_image(bytes(data))


BMP_FIELDS = {"file size": 2, "start": 10, "height": 22, "bits": 28, "compression": 30, "pixel bytes": 34, "colors": 46}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, None),
        ({"pixel bytes": 0, "file size": 0}, None),
        ({"height": -16}, None),
        ({"compression": 1}, "is a compressed BMP; save it as PNG or JPEG"),
        ({"height": 8}, "has more pixels than its size"),
        ({"height": -8}, "has more pixels than its size"),
        ({"height": 8, "pixel bytes": 0}, "has more pixels than its size"),
        ({"start": 20, "pixel bytes": 0, "file size": 0}, "the pixels of its BMP begin within its header"),
        ({"colors": 16}, "its BMP has pixels of more colors than its palette of 16"),
        ({"start": 54 + 64, "height": 16 + 60}, "its BMP has pixels of more colors than its palette of 16"),
    ],
)
def test_a_bmp_that_contradicts_itself_is_refused(fields, problem):
    data = saved(numbered(256), "BMP")
    for name, value in fields.items():
        data[BMP_FIELDS[name] : BMP_FIELDS[name] + 4] = struct.pack("<i", value)
    if problem is None:
        assert open_image(bytes(data)).size == (16, 16)
        return
    with pytest.raises(UserError, match=problem):
        open_image(bytes(data))


def test_a_bmp_of_gray_levels_has_their_bits():
    """Pillow reads 8 bits per pixel as 1 if there are two colors, black and white."""
    data = saved(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2), "BMP")
    data[46:50] = struct.pack("<I", 2)
    data[54:62] = bytes([0, 0, 0, 0, 255, 255, 255, 0])
    with pytest.raises(UserError, match="is a BMP of 8 bits with few gray levels; save it as PNG"):
        open_image(bytes(data))
    for mode in ("1", "L", "RGB"):
        assert open_image(bytes(saved(numbered(256).convert(mode), "BMP"))).size == (16, 16)


def test_an_image_that_a_program_opened_is_checked_like_its_file():
    data = of_chunks((b"IHDR", HEADER), (b"PLTE", bytes(range(27))), PIXELS, END)
    with pytest.raises(UserError, match="its PNG has pixels of more colors than its palette of 9"):
        open_image(Image.open(io.BytesIO(data)))
    with pytest.raises(UserError, match="its PNG has 50 % of the pixels"):
        open_image(Image.open(io.BytesIO(png(4, 6, rows(4, 3)))))
    opened = Image.open(io.BytesIO(png(4, 6, rows(4, 6))))
    assert open_image(opened).size == open_image(opened).size == (4, 6)
    short = numbered(256)
    short.putpalette(bytes(range(48)))
    with pytest.raises(UserError, match="the image is broken: it has pixels of more colors than its palette of 16"):
        open_image(short)
    assert all(open_image(image).size == (16, 16) for image in (numbered(16), numbered(256).quantize(7)))


def test_an_image_that_is_in_its_transparency_alone_is_refused():
    """Logos and drawings are often black everywhere; models see them without their transparency."""
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    black, gray = Image.new("RGB", (16, 16)), numbered(256).convert("RGB")
    for image in (gray, black):
        image.putalpha(alpha)
    assert open_image(gray).size == (16, 16)
    with pytest.raises(UserError, match="what it shows is in its transparency, which models do not see; save it"):
        open_image(black)
    black.putalpha(7)
    assert open_image(black).size == (16, 16)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (3, 4, 4)])
def test_an_image_of_zeros_and_ones_is_refused(shape):
    pixels = np.zeros(shape, np.uint8)
    if len(shape) == 3:
        pixels[..., 3:] = 9  # the opacity, if there is one
    assert open_image(Image.fromarray(pixels)).size == open_image(Image.fromarray(pixels + 1)).size == (4, 3)
    pixels[1, 2] = 1
    with pytest.raises(UserError, match="the image would be black: its values are 0 and 1 of 255"):
        open_image(Image.fromarray(pixels))


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_channels_of_16_bits_that_would_become_black_are_refused(color, channels):
    """Pillow drops the lower 8 bits of each."""

    def of(value):
        return png(1, 1, b"\0" + value.to_bytes(2, "big") * channels, bits=16, color=color)

    for dark in (0, 255, 16383):
        with pytest.raises(UserError, match="be almost black: nearly all 16-bit values are below 16,384; save it"):
            open_image(of(dark))
    assert np.asarray(open_image(of(16384)).convert("RGB")).tolist() == [[[64, 64, 64]]]


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


def test_what_cannot_be_seen_is_refused():
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    pixels[..., 3] = 0
    with pytest.raises(UserError, match="fully transparent, so that there is nothing to see"):
        open_image(Image.fromarray(pixels))
    pixels[1, 2, 3] = 1
    assert open_image(Image.fromarray(pixels)).size == (4, 3)
    with pytest.raises(UserError, match="is a Git LFS pointer; run `git lfs pull`"):
        open_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
