"""Bounds on the segments, tags and scans of JPEG files, checked without decoding."""

import re

from idefics2_engine.errors import ImageError
from idefics2_engine.images.bounds.tags import check_exif

# Encoders write at most 18 scans. Each costs up to half as much as decoding a plain file.
_MAX_SCANS = 24
# Bound on the bytes that Pillow parses: frame headers, tables, and the tags of EXIF and Photoshop
_MAX_PARSED_BYTES = 1 << 19
_MAX_SEGMENTS = 1000
_MAX_SEGMENT_BYTES = 16 << 20
# Pillow reads the fill bytes between segments one by one
_MAX_FILL = 1 << 12

# A marker is a byte FF that neither a stuffed zero nor a fill byte follows. The pattern `FF+` would
# take quadratic time in fill bytes.
_MARKER = re.compile(rb"\xff([^\x00\xff])")
# Within a scan, restart markers and TEM, which have no contents, count as data
_MARKER_IN_SCAN = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_EXIF, _PHOTOSHOP = b"Exif\0\0", b"Photoshop 3.0\0"
_SOI, _EOI, _SOS, _DQT, _APP1, _APP13 = 0xD8, 0xD9, 0xDA, 0xDB, 0xE1, 0xED
_FRAMES = frozenset((*range(0xC0, 0xD0), 0xDE)) - {0xC4, 0xC8, 0xCC}
# Pillow reads no contents after these markers
_BARE = frozenset((0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))


def check_jpeg(data: bytes, max_pixels: int, name: str) -> None:
    """Check the segments, tags and scans of a JPEG file against their bounds.

    Args:
        data: The file.
        max_pixels: Most pixels that count towards the bound on the bytes of scans.
        name: Name of the file in error messages.

    Raises:
        ImageError: A bound is exceeded. Damage is left to the decoder.
    """
    segments = total = parsed = pixels = 0
    exif: list[bytes] = []
    at, code = 2, 0
    while code != _SOS:
        match = _MARKER.search(data, at, at + _MAX_FILL)
        if match is None and at + _MAX_FILL < len(data):
            raise ImageError(f"{name}: must have at most {_MAX_FILL} bytes of fill, got more")
        if match is None:
            break
        code, at = match[1][0], match.end()
        # Pillow rejects a file with such a marker
        if code < 0xC0:
            break
        size = 0 if code in _BARE else max(2, int.from_bytes(data[at : at + 2]))
        if code in _FRAMES:
            height, width = (int.from_bytes(data[at + n : at + n + 2]) for n in (3, 5))
            pixels = min(width * height, max_pixels)
        is_exif = code == _APP1 and data.startswith(_EXIF, at + 2)
        if is_exif:
            exif.append(data[at + 2 + len(_EXIF) : at + size])
        segments += 1
        total += size
        is_photoshop = code == _APP13 and data.startswith(_PHOTOSHOP, at + 2)
        if is_exif or is_photoshop or code == _DQT or code in _FRAMES:
            parsed += size
        at += size
        if segments > _MAX_SEGMENTS or total > _MAX_SEGMENT_BYTES:
            raise ImageError(
                f"{name}: must have at most {_MAX_SEGMENTS} segments of {_MAX_SEGMENT_BYTES} bytes "
                f"before its pixels, got {segments} of {total}"
            )
        if parsed > _MAX_PARSED_BYTES:
            raise ImageError(
                f"{name}: must have at most {_MAX_PARSED_BYTES} bytes of tables, and of tags of "
                f"EXIF and Photoshop, got {parsed}"
            )
    check_exif(b"".join(exif), name)
    if code == _SOS:
        end = at + max_stream_bytes(pixels)
        if not check_scans(data, at, end, name, scans=1) and end < len(data):
            raise ImageError(
                f"{name}: must have at most {end - at} bytes in scans at its size, got more"
            )


def max_stream_bytes(pixels: int) -> int:
    """Return the most bytes that all scans of an image of ``pixels`` may have together.

    Noise at full quality takes 2 bytes a pixel. The bound is 16 bytes a pixel and 1 MiB.
    """
    return (1 << 20) + 16 * pixels


def check_scans(data: bytes, start: int, end: int, name: str, scans: int = 0) -> bool:
    """Check the scans of one JPEG stream against the bound.

    Args:
        data: The file.
        start: First byte of the stream to check.
        end: Byte after the last one to check.
        name: Name of the file in error messages.
        scans: Scans of the stream that begin before ``start``.

    Returns:
        Whether the stream's end was found.

    Raises:
        ImageError: The stream has too many scans, or too many segments in all.
    """
    segments = 0
    at = start
    while (match := _MARKER_IN_SCAN.search(data, at, end)) is not None:
        code, at = match[1][0], match.end()
        if code in (_SOI, _EOI):
            # libjpeg ends or gives up at such a marker
            if scans:
                return True
            continue
        scans += code == _SOS
        if scans > _MAX_SCANS:
            raise ImageError(f"{name}: must have at most {_MAX_SCANS} scans, got more")
        segments += 1
        if segments > _MAX_SEGMENTS:
            raise ImageError(
                f"{name}: must have at most {_MAX_SEGMENTS} segments between scans, got more"
            )
        at += int.from_bytes(data[at : at + 2])
    return False
