"""The image formats that are read, and what decoders accept although a format forbids it.

They show it as a black, gray or garbled part of an image.
"""

import itertools
import re
import struct
import zlib
from collections.abc import Iterator

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
STEP = 2**20  # bytes that are decompressed at once
MOST_CHUNKS = 2**16  # of a PNG; writers make chunks of 4 kB and more


def check(image: Image.Image, data: bytes | Image.Image) -> None:
    """Checks the content of an opened image before it is decoded.

    Formats other than PNG have no checksum, so that bytes that were changed or lost are not always found. A JPEG that
    ends early, but with an end marker, is filled with gray by libjpeg, and Pillow is silent.

    Args:
        image: the image.
        data: its file; anything else is not checked.

    Raises:
        UserError: the format is not read; a JPEG has a zero in a quantization table; a PNG has a wrong checksum, no
            end, no palette, a header or chunks that its format forbids, or other pixels than its size; a palette lacks
            colors of the pixels.
    """
    if image.format not in (None, *FORMATS, MPO):  # None: the program made the image
        raise UserError(f"the image is {image.format}; save it as {NAMES}")
    if image.format == "JPEG" and any(0 in table for table in getattr(image, "quantization", {}).values()):
        raise UserError("the image is broken: a quantization table of its JPEG has a zero")
    if not isinstance(data, bytes) or image.format not in COLORS:
        return
    colors = COLORS[image.format](data)
    if image.format == "GIF" and not colors:
        raise UserError("the image is broken: its GIF has no table of colors")
    if image.mode == "P" or (image.mode == "L" and image.format != "PNG"):  # a palette of grays becomes the mode L
        hidden = image.info.get("transparency") if image.format == "GIF" else None  # may have no color
        if image.getextrema()[1] >= colors and image.getextrema()[1] != hidden:
            problem = f"its {image.format} has pixels of more colors than its palette of {colors:,}"
            raise UserError(f"the image is broken: {problem}")


def _gif_colors(data: bytes) -> int:
    """The number of colors of the table of a GIF's first image, its own or that of the file; 0 if there is none."""

    def table(flags: int) -> int:
        return 2 << (flags & 7) if flags & 128 else 0

    position = 13 + 3 * table(data[10])  # after the signature, the screen and the table of the file
    while data[position : position + 1] == b"!":  # extensions: a label, and blocks up to an empty one
        position += 2
        while size := data[position] if position < len(data) else 0:
            position += 1 + size
        position += 1
    own = table(data[position + 9]) if position + 9 < len(data) else 0
    return own or table(data[10])


def _bmp_colors(data: bytes) -> int:
    """The number of colors of a BMP's palette before its pixels; of one without a palette, a meaningless number."""
    start, header = struct.unpack_from("<II", data, 10)
    if start < 14 + header:
        raise UserError("the image is broken: the pixels of its BMP begin within its header")
    if header < 40:  # as of OS/2
        bits, used, size = struct.unpack_from("<H", data, 24)[0], 0, 3
    else:
        bits, used, size = struct.unpack_from("<H", data, 28)[0], struct.unpack_from("<I", data, 46)[0], 4
    count = used or 1 << min(bits, 8)
    # Pillow, like others, puts the pixels after the palette if they are said to begin where the palette does.
    return count if start == 14 + header else min(count, (start - 14 - header) // size)


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
    if color == PALETTE and b" PLTE " not in critical:
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
