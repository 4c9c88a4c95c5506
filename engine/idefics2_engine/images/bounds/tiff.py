"""Bounds on the tags, strips and tiles of TIFF files, checked without decoding."""

from idefics2_engine.errors import ImageError
from idefics2_engine.images.bounds.jpeg import check_scans, max_stream_bytes
from idefics2_engine.images.bounds.tags import Tag, Tiff, check_tags

# Tags may have so many bytes more per pixel, because Photoshop stores its layers in a tag
_TAG_BYTES_A_PIXEL = 4
# A file may have one strip more per _PIXELS_A_STRIP pixels. Encoders write at least 8 KiB into a
# strip.
_MAX_STRIPS, _PIXELS_A_STRIP = 4096, 1000
# The image may fill only a part of its tiles. All tiles together may have _PADDED times its pixels
# and _MAX_PADDING more.
_MAX_PADDING, _PADDED = 1 << 20, 4

_WIDTH, _HEIGHT, _COMPRESSION = 256, 257, 259
_STRIP_OFFSETS, _SAMPLES, _STRIP_ROWS, _STRIP_SIZES, _PLANES = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES = 322, 323, 324, 325
_ARRAYS = (_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES)
_READ_ONCE = (
    *(_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _STRIP_ROWS, _PLANES, _TILE_WIDTH, _TILE_HEIGHT),
    *_ARRAYS,
)
_JPEG = 7


def check_tiff(data: bytes, max_pixels: int, name: str) -> None:
    """Check the tags, strips and tiles of a TIFF file against their bounds.

    Args:
        data: The file.
        max_pixels: Most pixels that count towards the bounds.
        name: Name of the file in error messages.

    Raises:
        ImageError: A bound is exceeded, or a tag that must be unique occurs twice. Damage is left
            to the decoder.
    """
    tiff = Tiff(data, name)
    tags = tiff.tags(tiff.first)
    # Pillow and libtiff could read another one of several equal tags than this check
    for number in _READ_ONCE:
        if sum(tag.number == number for tag in tags) > 1:
            raise ImageError(f"{name}: must have each tag once, got tag {number} again")
    pixels = min(_value(tiff, tags, _WIDTH, 0) * _value(tiff, tags, _HEIGHT, 0), max_pixels)
    _check_parts(tiff, tags, pixels)
    values = [tag for tag in tags if tag.number not in _ARRAYS]
    check_tags(tiff, values, _TAG_BYTES_A_PIXEL * pixels)


def _check_parts(tiff: Tiff, tags: list[Tag], pixels: int) -> None:
    """Check the number of strips and tiles, both listed and implied by the size, and JPEG streams.

    Raises:
        ImageError: A bound is exceeded.
    """
    width, height = _value(tiff, tags, _WIDTH, 0), _value(tiff, tags, _HEIGHT, 0)
    planes = _value(tiff, tags, _SAMPLES, 1) if _value(tiff, tags, _PLANES, 1) == 2 else 1
    across, down = 1, -(-height // max(1, _value(tiff, tags, _STRIP_ROWS, height)))
    if any(tag.number in (_TILE_WIDTH, _TILE_HEIGHT) for tag in tags):
        tile = [max(1, _value(tiff, tags, key, 1)) for key in (_TILE_WIDTH, _TILE_HEIGHT)]
        across, down = -(-width // tile[0]), -(-height // tile[1])
        most = _MAX_PADDING + _PADDED * pixels
        if across * down * tile[0] * tile[1] > most:
            raise ImageError(
                f"{tiff.name}: must have tiles of at most {most} pixels together at its size, got "
                f"{across} x {down} of {tile[0]} x {tile[1]}"
            )
    most = _MAX_STRIPS + pixels // _PIXELS_A_STRIP
    listed = [tag.count for tag in tags if tag.number in _ARRAYS]
    got = max(across * down * planes, *listed, 0)
    if got > most:
        raise ImageError(
            f"{tiff.name}: must have at most {most} strips or tiles at its size, got {got}"
        )
    if _value(tiff, tags, _COMPRESSION, 1) == _JPEG:
        _check_streams(tiff, tags, pixels)


def _check_streams(tiff: Tiff, tags: list[Tag], pixels: int) -> None:
    """Check strips or tiles that are JPEG streams against the bounds on bytes and scans.

    Raises:
        ImageError: A bound is exceeded.
    """
    arrays = {tag.number: tiff.values(tag) for tag in tags if tag.number in _ARRAYS}
    most, total = max_stream_bytes(pixels), 0
    for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_SIZES), (_TILE_OFFSETS, _TILE_SIZES)):
        for start, size in zip(arrays.get(offsets, ()), arrays.get(sizes, ()), strict=False):
            end = min(int(start) + int(size), len(tiff.data))
            # Bytes that several parts share count for each of them
            total += max(0, end - int(start))
            if total > most:
                raise ImageError(
                    f"{tiff.name}: must have at most {most} bytes in strips or tiles at its size, "
                    "got more"
                )
            check_scans(tiff.data, int(start), end, tiff.name)


def _value(tiff: Tiff, tags: list[Tag], number: int, default: int) -> int:
    """Return a tag's first integer, at least 0, or ``default`` if the tag has none."""
    found = (tiff.values(tag) for tag in tags if tag.number == number)
    return next((max(0, int(values[0])) for values in found if len(values)), default)
