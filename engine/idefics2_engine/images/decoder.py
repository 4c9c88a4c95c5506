"""Decoding of image files, with limits on formats and sizes.

The first bytes of a file select one Pillow plugin. Pillow's own search is not used, because it
loads other plugins, and EPS would start Ghostscript. An image with too many pixels is rejected
before memory for them is allocated. Pillow's own limit is process-wide and stays unchanged.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from idefics2_engine.errors import ImageError
from idefics2_engine.images.bounds.bounded_file import BoundedFile
from idefics2_engine.images.bounds.chunks import check_png, check_webp
from idefics2_engine.images.bounds.jpeg import check_jpeg
from idefics2_engine.images.bounds.tiff import check_tiff
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.pillow_guard import guard_pillow
from idefics2_engine.images.policy import (
    ImagePolicy,
    Warn,
    loaded_orientation,
    upright_rgb,
    warn_of_image,
)
from idefics2_engine.images.ppm import in_binary

# One more read is allowed per so many pixels. GIF has the smallest parts, blocks of 255 bytes that
# take two reads.
_PIXELS_A_READ = 64
# Pillow's decoders in Python are up to 500 times slower than those in C
_MAX_PYTHON_PIXELS = 1 << 20
# Bound on the pixels of a row per byte between the starts of two strips. Strips that do not overlap
# have at most 8.
_MAX_PIXELS_A_BYTE = 64


@dataclass(frozen=True)
class _Format:
    """A file format, with the functions that open and check its files.

    Attributes:
        name: Name in error messages.
        beginnings: First bytes of its files.
        open: Opens a file with Pillow's plugin.
        is_whole: Returns whether a file is complete, as far as its bytes tell without decoding.
        check: Raises ``ImageError`` if counting shows that a file has more parts than its pixels
            need. The arguments are the file, the largest number of pixels, and the file's name in
            error messages.
    """

    name: str
    beginnings: tuple[bytes, ...]
    open: Callable[[BoundedFile], ImageFile]
    is_whole: Callable[[bytes], bool]
    check: Callable[[bytes, int, str], None] = lambda _data, _max_pixels, _name: None


def decode(
    data: bytes, policy: ImagePolicy, max_pixels: int, name: str, warn: Warn = warn_of_image
) -> Image.Image:
    """Return the image in a file, upright and in RGB, as ``decode_with_info`` does."""
    return decode_with_info(data, policy, max_pixels, name, warn)[0]


def decode_with_info(
    data: bytes, policy: ImagePolicy, max_pixels: int, name: str, warn: Warn = warn_of_image
) -> tuple[Image.Image, ImageInfo]:
    """Return the image in a file, upright and in RGB, and what it was before, without a hash.

    Args:
        data: A PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file.
        policy: How to read alpha, rotation, 16 bits and further frames.
        max_pixels: Largest width x height.
        name: Name of the file in error messages.
        warn: Called about parts of the image that are not read.

    Raises:
        ImageError: The file has another format, is damaged or too large, or the policy refuses it.
    """
    with open_image(data, policy, max_pixels, name) as image:
        # Loading may change the mode
        width, height, mode = image.width, image.height, image.mode
        rgb = upright_rgb(image, policy, name, warn)
        turn = loaded_orientation(image)
        kind = _format(data)
        assert kind is not None
        info = ImageInfo(width, height, mode=mode, format=kind.name, orientation=turn)
        # A copy has neither the file nor its further frames
        return rgb.copy() if rgb is image else rgb, info


@contextmanager
def open_image(data: bytes, policy: ImagePolicy, max_pixels: int, name: str) -> Iterator[ImageFile]:
    """Open the image in a file, after all checks that need no decoded pixels.

    The arguments are those of ``decode``. Pillow's errors inside the ``with`` statement are
    converted, and its warnings are suppressed.

    Raises:
        ImageError: As in ``decode``.
    """
    kind = _format(data)
    if kind is None:
        names = ", ".join(one.name for one in _FORMATS)
        # The message does not quote the contents, which may be private
        got = "another kind of file" if data else "no bytes"
        raise ImageError(f"{name}: must be an image file ({names}), got {got}")
    with guard_pillow(f"{name}: cannot be read as {kind.name}: it is damaged or cut off"):
        kind.check(data, max_pixels, name)
        file = BoundedFile(data, name)
        with kind.open(file) as opened:
            check_size(opened.size, max_pixels, name)
            file.allow(opened.width * opened.height // _PIXELS_A_READ)
            image = opened
            if kind.name == "PPM":
                image = PpmImagePlugin.PpmImageFile(io.BytesIO(in_binary(opened, data, name)))
            _check_tiles(image, file, name)
            if policy is ImagePolicy.STRICT and not kind.is_whole(data):
                raise ImageError(f"{name}: image_policy='strict' refuses a {kind.name} cut off")
            yield image


def check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Check a (width, height) in pixels against the limit.

    Raises:
        ImageError: There are more than ``max_pixels`` pixels, or none.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: must have pixels, got {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(f"{name}: must have at most {max_pixels} pixels, got {width} x {height}")


def _format(data: bytes) -> _Format | None:
    for kind in _FORMATS:
        if data.startswith(kind.beginnings) and (kind.name != "WebP" or data[8:12] == b"WEBP"):
            return kind
    return None


def _check_tiles(image: ImageFile, file: BoundedFile, name: str) -> None:
    """Bound the cost of Pillow's decoders in Python, and of rows that are read piece by piece.

    Raises:
        ImageError: A bound is exceeded.
    """
    # This dictionary has exactly the decoders in Python
    if any(tile[0] in Image.DECODERS for tile in image.tile):
        pixels, size = image.width * image.height, len(file.getbuffer())
        if max(pixels, size) > _MAX_PYTHON_PIXELS:
            raise ImageError(
                f"{name}: must have at most {_MAX_PYTHON_PIXELS} pixels and bytes in run-length "
                f"encoding, got {pixels} and {size}"
            )
        file.allow(2 * pixels)
    # Pillow reads up to the next strip and appends that to the part of a row that it has. Many
    # small pieces would take quadratic time.
    image.decodermaxblock = max(image.decodermaxblock, image.width)
    starts = sorted({tile.offset for tile in image.tile})
    if any((end - start) * _MAX_PIXELS_A_BYTE < image.width for start, end in pairwise(starts)):
        raise ImageError(f"{name}: must have strips apart from each other, got some that overlap")


def _check_webp(data: bytes, max_pixels: int, name: str) -> None:
    """Check a WebP file's size and chunks.

    The size is checked before the plugin opens the file, because that allocates the image.

    Raises:
        ImageError: The size or the number of chunks or tags exceeds its bound.
    """
    check_size(_webp_size(data), max_pixels, name)
    check_webp(data, name)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of a WebP file from its header."""
    chunk, body = data[12:16], data[20:30]
    # The canvas has 24 bits a side
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    # A signature of one byte precedes 14 bits a side
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    return width, height


def _whole_png(data: bytes) -> bool:
    """Return whether every chunk has the right checksum and IEND is present."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at = end + 4
    return False


def _whole_webp(data: bytes) -> bool:
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")


def _whole_bmp(data: bytes) -> bool:
    return len(data) >= int.from_bytes(data[2:6], "little")


_FORMATS = (
    _Format("PNG", (b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile, _whole_png, check_png),
    _Format(
        "JPEG",
        (b"\xff\xd8\xff",),
        JpegImagePlugin.JpegImageFile,
        # Cameras append padding to the end marker
        lambda data: b"\xff\xd9" in data[-1024:],
        check_jpeg,
    ),
    _Format("WebP", (b"RIFF",), WebPImagePlugin.WebPImageFile, _whole_webp, _check_webp),
    _Format(
        "GIF", (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile, lambda data: b";" in data[-16:]
    ),
    _Format("BMP", (b"BM",), BmpImagePlugin.BmpImageFile, _whole_bmp),
    _Format(
        "TIFF",
        (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
        TiffImagePlugin.TiffImageFile,
        # The parts of a TIFF have any order, so its end shows nothing
        lambda _data: True,
        check_tiff,
    ),
    _Format(
        "PPM",
        tuple(b"P%d" % number for number in range(1, 7)),
        PpmImagePlugin.PpmImageFile,
        # Decoding fails if a byte is missing
        lambda _data: True,
    ),
)
