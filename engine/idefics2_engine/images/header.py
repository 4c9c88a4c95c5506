"""The header of an image: what a file says about its pixels, without decoding them.

A header is opened by the rules of ``loader.load_image``, with the same errors. Damage of the pixels
is found only when they are decoded.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from idefics2_engine.images.bounds.chunks import late_orientation
from idefics2_engine.images.decoder import open_image
from idefics2_engine.images.loader import (
    ImageSource,
    MediaConfig,
    check_source,
    is_url,
    load_image,
    named_bytes,
)
from idefics2_engine.images.policy import (
    ImagePolicy,
    known_orientation,
    loaded_orientation,
    refuse_doubtful,
)
from idefics2_engine.images.sources.source_forms import plain_source

# An image with these orientations is stored on its side
_TURNED = range(5, 9)


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image before its pixels.

    Attributes:
        size: Width and height in pixels when the image is upright, as the model sees it.
        fingerprint: SHA-256 of the file, or of the pixels of an image in memory.
    """

    size: tuple[int, int]
    fingerprint: bytes


def read_header(source: ImageSource, config: MediaConfig) -> ImageHeader | None:
    """Read the header of an image; ``None`` if it would be downloaded, which this does not do.

    Args:
        source: See ``loader.load_image``.
        config: Rules for images.

    Raises:
        ImageError: As in ``loader.load_image``, if the pixels need not be decoded to find it.
    """
    plain = plain_source(source, config.max_media_bytes)
    if is_url(plain):
        check_source(plain, config)
        return None
    if not isinstance(plain, str | bytes | Path):
        image = load_image(plain, config)
        digest = sha256(np.asarray(image).tobytes()).digest()
        return ImageHeader(image.size, digest)
    name, data = named_bytes(plain, config)
    # Processors have instructions for it, so it takes a third of the time of BLAKE2
    digest = sha256(data).digest()
    policy = config.image_policy
    with open_image(data, policy, config.max_image_pixels, name) as image:
        turns: list[int] = []

        def certain_orientation(opened: Image.Image) -> int:
            turns.append(_orientation(opened, data))
            # Pillow turns a TIFF when it is decoded, and damage comes before doubts
            return turns[0] if turns[0] == 1 else loaded_orientation(opened)

        stored = _stored_size(image)
        if policy is ImagePolicy.STRICT:
            refuse_doubtful(image, name, certain_orientation)
        turn = turns[0] if turns else _orientation(image, data)
    size = stored[::-1] if turn in _TURNED else stored
    return ImageHeader(size, digest)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    # Pillow turns the size of a TIFF by its tag, but not by an orientation in XMP
    if isinstance(image, TiffImageFile):
        return int(image.tag_v2[IMAGEWIDTH]), int(image.tag_v2[IMAGELENGTH])
    return image.size


def _orientation(image: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, for which only a PNG with EXIF behind its pixels is decoded."""
    if not isinstance(image, PngImageFile):
        return known_orientation(image.getexif())
    if late_orientation(data):
        return loaded_orientation(image)
    # Pillow's method for PNG files would decode the pixels
    return known_orientation(Image.Image.getexif(image))
