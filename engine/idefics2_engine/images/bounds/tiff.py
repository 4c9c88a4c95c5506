"""What a TIFF file may hold beside its pixels, counted from its directory without decoding."""

from idefics2_engine.errors import ImageError
from idefics2_engine.images.bounds.jpeg import check_scans, max_stream_bytes
from idefics2_engine.images.bounds.tags import Tag, Tiff, check_tags

_TAG_BYTES_A_PIXEL = 4  # Photoshop keeps its layers in a tag
_MAX_STRIPS, _PIXELS_A_STRIP = 4096, 1000  # encoders write 8 KiB and more in one
_MAX_PADDING, _PADDED = 1 << 20, 4  # pixels of tiles, of which the image may fill a part

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
    """Hold a TIFF file to the bounds on tags, strips and tiles.

    Raises:
        ImageError: It has too many. What is damaged is left to the decoder.
    """
    tiff = Tiff(data, name)
    tags = tiff.tags(tiff.first)
    for number in _READ_ONCE:  # or Pillow and libtiff might read another than we
        if sum(tag.number == number for tag in tags) > 1:
            raise ImageError(f"{name}: must have each tag once, got tag {number} again")
    pixels = min(_value(tiff, tags, _WIDTH, 0) * _value(tiff, tags, _HEIGHT, 0), max_pixels)
    _check_parts(tiff, tags, pixels)
    values = [tag for tag in tags if tag.number not in _ARRAYS]
    check_tags(tiff, values, _TAG_BYTES_A_PIXEL * pixels)


def _check_parts(tiff: Tiff, tags: list[Tag], pixels: int) -> None:
    """Hold strips and tiles to their bounds: those listed, and those that the size asks for."""
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
    """Hold strips or tiles that are JPEG streams to the bounds on bytes and scans."""
    arrays = {tag.number: tiff.values(tag) for tag in tags if tag.number in _ARRAYS}
    most, total = max_stream_bytes(pixels), 0
    for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_SIZES), (_TILE_OFFSETS, _TILE_SIZES)):
        for start, size in zip(arrays.get(offsets, ()), arrays.get(sizes, ()), strict=False):
            end = min(int(start) + int(size), len(tiff.data))
            total += max(0, end - int(start))  # of one that several share, each time anew
            if total > most:
                raise ImageError(
                    f"{tiff.name}: must have at most {most} bytes in strips or tiles at its size, "
                    "got more"
                )
            check_scans(tiff.data, int(start), end, tiff.name)


def _value(tiff: Tiff, tags: list[Tag], number: int, default: int) -> int:
    """Return the value of a tag, 0 or more; ``default`` where it is missing or no integer."""
    found = (tiff.values(tag) for tag in tags if tag.number == number)
    return next((max(0, int(values[0])) for values in found if len(values)), default)
