"""The image formats that are read, and what decoders accept although a format forbids it.

They show it as a black, gray or garbled part of an image.
"""

import io
import itertools
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vkd_jax.types import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MPO = "MPO"  # a JPEG with further views, as phones write them; Pillow opens it as a JPEG
NAMES = "PNG, JPEG, WebP, BMP or GIF"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its color type
ORDER = re.compile(rb"IHDR( PLTE)?( IDAT)+ IEND")  # of a PNG's critical chunks, whose names begin with a capital
PALETTE = 3  # the color type of a PNG whose pixels are numbers of colors
# First column and row, and steps, of the passes of an interlaced PNG.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
COLORED = 2  # the bit of color types that have colors; the others have gray levels
BMP_COMPRESSIONS = (0, 3)  # none, and none with the bits of each color; others may leave pixels out
WITH_PROFILE = 124  # the size of a BMP's header that may announce a color profile after the pixels
STEP = 2**20  # bytes that are decompressed at once
MOST_CHUNKS = 2**16  # of a PNG; writers make chunks of 4 kB and more


def check(image: Image.Image, data: bytes | Image.Image) -> None:
    """Checks the content of an opened image before it is decoded.

    Formats other than PNG have no checksum, so that bytes that were changed or lost are not always found. A JPEG that
    ends early, but with an end marker, is filled with gray by libjpeg, and Pillow is silent.

    Args:
        image: the image.
        data: its file, or the image itself, whose file is read if it was opened and is not decoded yet.

    Raises:
        UserError: the format is not read; a JPEG has a zero in a quantization table; a PNG has a wrong checksum, no
            end, no palette, a header or chunks that its format forbids, or other pixels than its size; a GIF has other
            pixels than its size; a BMP is compressed or has more; a palette lacks colors of the pixels.
    """
    if image.format not in (None, *FORMATS, MPO):  # None: the program made the image
        raise UserError(f"the image is {image.format}; save it as {NAMES}")
    if image.format == "JPEG" and any(0 in table for table in getattr(image, "quantization", {}).values()):
        raise UserError("the image is broken: a quantization table of its JPEG has a zero")
    data = data if isinstance(data, bytes) else _undecoded_file(data)
    if not data or image.format not in COLORS:
        _check_palette(image)
        return
    colors = COLORS[image.format](data)
    if image.format == "BMP" and image.mode in ("1", "L") and _bmp_bits(data) != (1 if image.mode == "1" else 8):
        raise UserError(f"the image is a BMP of {_bmp_bits(data)} bits with few gray levels; save it as PNG")  # misread
    if image.format == "GIF" and not colors:
        raise UserError("the image is broken: its GIF has no table of colors")
    if image.mode == "P" or (image.mode == "L" and image.format != "PNG"):  # a palette of grays becomes the mode L
        hidden = image.info.get("transparency") if image.format == "GIF" else None  # may have no color
        if image.getextrema()[1] >= colors and image.getextrema()[1] != hidden:
            problem = f"its {image.format} has pixels of more colors than its palette of {colors:,}"
            raise UserError(f"the image is broken: {problem}")


def _check_palette(image: Image.Image) -> None:
    """Checks the numbers of colors of an image that a program made; Pillow shows those beyond the palette as black."""
    palette = image.palette  # an empty one means gray levels
    colors = len(palette.palette) // len(palette.mode) if palette and palette.palette else None
    if image.mode in ("P", "PA") and colors is not None and np.ravel(image.getextrema())[1] >= colors:
        if np.ravel(image.getextrema())[1] != image.info.get("transparency"):
            raise UserError(f"the image is broken: it has pixels of more colors than its palette of {colors:,}")


def _undecoded_file(image: Image.Image) -> bytes | None:
    """The file of an image that a program has opened; None if it has no file, or its pixels are already decoded."""
    stream = getattr(image, "fp", None)
    if stream is None or not getattr(image, "tile", None):
        return None
    position = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(position)
    return data


def _gif_colors(data: bytes) -> int:
    """The size of the color table of a GIF's first image, its own or that of the file; 0 without one."""

    def table(flags: int) -> int:
        return 2 << (flags & 7) if flags & 128 else 0

    position = 13 + 3 * table(data[10])  # after the signature, the screen and the table of the file
    while position < len(data) and data[position] != ord(","):  # extensions: a label, and blocks
        position = _after_blocks(data, position + 2) if data[position] == ord("!") else position + 1
    own = table(data[position + 9]) if position + 9 < len(data) else 0
    if own or table(data[10]):
        _check_gif_pixels(data, position, position + 10 + 3 * own)
    return own or table(data[10])


def _check_gif_pixels(data: bytes, start: int, pixels: int) -> None:
    """Checks that the first image of a GIF, from `start`, has as many pixels as it says; they begin at `pixels`."""
    width, height = struct.unpack("<HH", data[6:10])
    if struct.unpack("<HHHH", data[start + 1 : start + 9]) != (0, 0, width, height):
        raise UserError("the image is a GIF whose first image has another area than the whole; save it as PNG")
    alone = bytearray(data[: _after_blocks(data, pixels + 1)] + b";")
    if not _decodes(alone):
        raise UserError("the image is truncated: its GIF has fewer pixels than its size")
    if height < 2**16 - 1:
        alone[8:10] = alone[start + 7 : start + 9] = struct.pack("<H", height + 1)
        if _decodes(alone):  # even with a further row
            raise UserError("the image is broken: its GIF has more pixels than its size")


def _after_blocks(data: bytes, position: int) -> int:
    """The position after the blocks of a GIF, each with its size, of which the last one is empty."""
    while size := data[position] if position < len(data) else 0:
        position += 1 + size
    return position + 1


def _decodes(data: bytes | bytearray) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("GIF",)) as image:
            image.load()
    except (OSError, Image.DecompressionBombError):
        return False
    return True


def _bmp_bits(data: bytes) -> int:
    return struct.unpack_from("<H", data, 28 if data[14] >= 40 else 24)[0]


def _bmp_colors(data: bytes) -> int:
    """The number of colors of a BMP's palette before its pixels; of one without a palette, a meaningless number."""
    start, header = struct.unpack_from("<II", data, 10)
    if start < 14 + header:
        raise UserError("the image is broken: the pixels of its BMP begin within its header")
    _check_bmp_pixels(data, start, header)
    if header < 40:  # as of OS/2
        bits, used, size = struct.unpack_from("<H", data, 24)[0], 0, 3
    else:
        bits, used, size = struct.unpack_from("<H", data, 28)[0], struct.unpack_from("<I", data, 46)[0], 4
    count = used or 1 << min(bits, 8)
    # Pillow, like others, puts the pixels after the palette if they are said to begin where the palette does.
    return count if start == 14 + header else min(count, (start - 14 - header) // size)


def _check_bmp_pixels(data: bytes, start: int, header: int) -> None:
    """Checks that a BMP is not compressed, and has no more rows than it says, by its own sizes of what it has."""
    if header < 40:
        return
    width, height, _, bits, compression, size = struct.unpack_from("<iiHHII", data, 18)
    if compression not in BMP_COMPRESSIONS:
        raise UserError("the image is a compressed BMP; save it as PNG or JPEG")
    if start == 14 + header and bits <= 8:  # before the palette, see `_bmp_colors`
        start += 4 * (int.from_bytes(data[46:50], "little") or 1 << bits)
    line = (width * bits + 31) // 32 * 4
    stated = max(size, int.from_bytes(data[2:6], "little") - start if header != WITH_PROFILE else 0)
    if (abs(height) + 1) * line <= min(stated, len(data) - start):
        raise UserError("the image is broken: its BMP has more pixels than its size")


def _check_png(data: bytes) -> int:
    """Checks the chunks of a PNG, and returns the number of colors of its palette."""
    chunks = list(itertools.islice(_chunks(data), MOST_CHUNKS + 1))
    if len(chunks) > MOST_CHUNKS:
        raise UserError(f"the image is broken: its PNG has more than {MOST_CHUNKS:,} chunks")
    critical = b" ".join(name for name, _ in chunks if name[:1].isupper())
    if not ORDER.fullmatch(critical):
        raise UserError("the image is broken: its PNG has a chunk that is unknown, repeated or not in its place")
    width, height, bits, color, *methods, interlaced = struct.unpack(">IIBBBBB", chunks[0][1][:13])
    if any(methods) or interlaced > 1 or len(chunks[0][1]) != 13:
        raise UserError("the image is broken: its PNG has a header that its format forbids")
    palette = next((content for name, content in chunks if name == b"PLTE"), None)
    if palette is not None and (len(palette) % 3 or not color & COLORED):
        raise UserError("the image is broken: its PNG has a palette that does not fit its header")
    if color == PALETTE and palette is None:
        raise UserError("the image is broken: its PNG has no palette, and needs one")
    expected = 0
    for x, y, columns, rows in PASSES if interlaced else ((0, 0, 1, 1),):
        pixels, lines = -(-(width - x) // columns), -(-(height - y) // rows)
        if pixels > 0 and lines > 0:
            expected += lines * (1 + -(-pixels * bits * CHANNELS.get(color, 1) // 8))  # a line begins with its filter
    decoder, found = zlib.decompressobj(), 0
    for name, content in chunks:
        while name == b"IDAT" and content and found <= expected:
            found += len(decoder.decompress(content, STEP))
            content = decoder.unconsumed_tail
    if found < expected:
        raise UserError(f"the image is truncated: its PNG has {100 * found // expected} % of the pixels")
    if found > expected:
        raise UserError("the image is broken: its PNG has more pixels than its size")
    return sum(len(content) for name, content in chunks if name == b"PLTE") // 3


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The name and the content of each chunk of a PNG up to its end, after its signature."""
    position, name = 8, b""
    while name != b"IEND":
        size = int.from_bytes(data[position : position + 4], "big")
        name, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        checksum = data[position + 8 + size : position + 12 + size]
        if len(checksum) < 4:
            raise UserError("the image is truncated: its PNG has no end")
        if int.from_bytes(checksum, "big") != zlib.crc32(content, zlib.crc32(name)):
            raise UserError("the image is broken: a checksum of its PNG is wrong")
        yield name, content
        position += 12 + size


# Functions of a file to the number of colors of its palette, by its format.
COLORS = {"PNG": _check_png, "GIF": _gif_colors, "BMP": _bmp_colors}
