"""Bounds on the chunks of PNG and WebP files, checked without decoding."""

import zlib
from collections.abc import Iterator

from idefics2_engine.errors import ImageError
from idefics2_engine.images.bounds.tags import check_exif

_MAX_CHUNKS = 1024
# A PNG may have one chunk more for so many pixels. Encoders write at least 4 KiB into a chunk.
_PIXELS_A_CHUNK = 512
# A frame of an animated PNG has at least two chunks
_MAX_ANIMATED_CHUNKS = 1 << 14
# Pillow inflates up to _MAX_TEXT bytes of each zTXt, iTXt and iCCP chunk
_MAX_TEXTS = 20
_MAX_TEXT = 1 << 20
_MAX_TEXT_BYTES = 16 << 20
# EXIF in hexadecimal digits follows this keyword of a text chunk
_RAW_EXIF = b"Raw profile type exif\0"
# Pillow looks for an orientation in the texts with these keywords
_TURNING_TEXTS = (_RAW_EXIF, b"XML:com.adobe.xmp\0", b"exif\0", b"xmp\0")


def check_png(data: bytes, max_pixels: int, name: str) -> None:
    """Check the chunks, texts and EXIF tags of a PNG file against their bounds.

    Args:
        data: The file.
        max_pixels: Most pixels that count towards the bound on chunks.
        name: Name of the file in error messages.

    Raises:
        ImageError: A bound is exceeded. Damage is left to the decoder.
    """
    most, texts, text_bytes = _MAX_CHUNKS, 0, 0
    for number, (kind, start, end) in enumerate(_png_chunks(data), 1):
        if kind == b"IHDR" and number == 1:
            width, height = (int.from_bytes(data[start + at : start + at + 4]) for at in (0, 4))
            most += min(width * height, max_pixels) // _PIXELS_A_CHUNK
        elif kind == b"acTL":
            most = max(most, _MAX_ANIMATED_CHUNKS)
        if number > most:
            raise ImageError(f"{name}: must have at most {most} chunks at its size, got more")
        if kind in (b"IDAT", b"fdAT"):
            continue
        if kind == b"eXIf":
            check_exif(data[start:end], name)
        elif data.startswith(_RAW_EXIF, start):
            check_exif(_raw_exif(kind, data[start + len(_RAW_EXIF) : end]), name)
        texts += kind in (b"zTXt", b"iTXt", b"iCCP")
        text_bytes += end - start
        if texts > _MAX_TEXTS or text_bytes > _MAX_TEXT_BYTES:
            raise ImageError(
                f"{name}: must have at most {_MAX_TEXTS} zTXt, iTXt and iCCP chunks, and "
                f"{_MAX_TEXT_BYTES} bytes beside its pixels, got {texts} and {text_bytes}"
            )


def late_orientation(data: bytes) -> bool:
    """Return whether a PNG file has a chunk behind its pixels that may say how it is turned."""
    pixels_began = False
    for kind, start, _ in _png_chunks(data):
        if kind == b"IDAT":
            pixels_began = True
        elif pixels_began and (
            kind == b"eXIf"
            or (kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_TURNING_TEXTS, start))
        ):
            return True
    return False


def check_webp(data: bytes, name: str) -> None:
    """Check the chunks and EXIF tags of a WebP file against their bounds; each frame is a chunk.

    Raises:
        ImageError: A bound is exceeded. Damage is left to the decoder.
    """
    number, at = 0, 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        number += 1
        if number > _MAX_ANIMATED_CHUNKS:
            raise ImageError(f"{name}: must have at most {_MAX_ANIMATED_CHUNKS} chunks, got more")
        if kind == b"EXIF":
            check_exif(data[at + 8 : at + 8 + size], name)
        at += 8 + size + size % 2


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each chunk and the start and end of its contents in bytes.

    IEND, or a chunk that is cut off, ends the iteration and is not yielded.
    """
    at = 8
    while at + 8 <= len(data):
        kind, start = data[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(data[at : at + 4])
        if kind == b"IEND" or end > len(data):
            return
        yield kind, start, end
        at = end + 4


def _raw_exif(kind: bytes, text: bytes) -> bytes:
    """Return the EXIF in the ``text`` that follows a text chunk's keyword.

    The result is empty if the text is damaged. Pillow finds no EXIF in it either.
    """
    packed = kind == b"zTXt"
    try:
        if kind == b"iTXt":
            packed = text[0] != 0
            text = text[2:].split(b"\0", 2)[2]
        elif packed:
            text = text[1:]
        if packed:
            text = zlib.decompressobj().decompress(text, _MAX_TEXT)
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except (ValueError, IndexError, zlib.error):
        return b""
