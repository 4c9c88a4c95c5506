"""Policies for ambiguous images: alpha, rotation, 16 bits, floats and several frames.

This module implements them for Pillow images, and ``arrays`` for arrays and tensors.
"""

import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from idefics2_engine.errors import ConfigError, ImageError, ImageWarning
from idefics2_engine.images.pixel_parts import convert_in_parts

# The policy ``strict`` accepts these modes if the image has no transparency
_PLAIN_MODES = ("1", "L", "P", "RGB")
# An image is blended on white in parts of so many pixels
PART_PIXELS = 1 << 20
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# These modes have colors premultiplied by alpha
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}


class ImagePolicy(StrEnum):
    """How to read an ambiguous image."""

    PARITY = "parity"
    """Read images as transformers does.

    Alpha channels are dropped, 16 bits saturate, and further frames are ignored without a warning.
    """
    CORRECT = "correct"
    """Read images as a viewer shows them.

    Alpha is blended on white, 16 bits and floats are scaled, and further frames cause a warning.
    """
    STRICT = "strict"
    """Raise an error for every ambiguous image."""

    @classmethod
    def named(cls, name: str) -> "ImagePolicy":
        """Return the policy called ``name``.

        Raises:
            ConfigError: There is no such policy.
        """
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(repr(policy.value) for policy in cls)
            raise ConfigError(f"image_policy must be one of {names}, got {name!r}") from None


Warn = Callable[[str, str], None]
"""Called with the name of an image and a description of what is not read of it."""


def warn_of_image(name: str, problem: str) -> None:
    """Issue an ``ImageWarning``."""
    warnings.warn(f"{name}: {problem}", ImageWarning, stacklevel=3)


def upright_rgb(
    image: Image.Image, policy: ImagePolicy, name: str, warn: Warn = warn_of_image
) -> Image.Image:
    """Return an image upright and in RGB, with ambiguities resolved by ``policy``.

    The image itself is returned if it needs no conversion. ``correct`` calls ``warn`` for an image
    with several frames.

    Raises:
        ImageError: The policy refuses the image, or a value is out of its range. Exceptions of
            Pillow are not converted.
    """
    if policy is ImagePolicy.PARITY:
        rgb = _rgb(_upright(image))
        # The conversion drops alpha but keeps a transparent color, which transformers composites on
        # white in a second step
        return rgb if rgb.info.get("transparency") is None else _on_white(rgb)
    # Loading may move to another frame, so this is read first
    several = has_several_frames(image)
    if policy is ImagePolicy.STRICT:
        refuse_doubtful(image, name)
        return _rgb(image)
    if several:
        warn(name, "has several frames or pages, only the current one is read")
    return _shown(_upright(image), name)


def has_several_frames(image: Image.Image) -> bool:
    """Return whether a file has several frames or pages."""
    return bool(getattr(image, "is_animated", False))


def refuse_doubtful(
    image: Image.Image, name: str, orientation: Callable[[Image.Image], int] | None = None
) -> None:
    """Apply the policy ``strict`` to an image that is not loaded.

    Args:
        image: The image.
        name: Its name in error messages.
        orientation: Returns its EXIF orientation. If ``None``, the image is loaded for it.

    Raises:
        ImageError: The image is ambiguous.
    """
    if has_several_frames(image):
        doubt = "several frames or pages"
    elif image.has_transparency_data:
        doubt = "transparency"
    # Only the tiles name the bits of a channel, and loading the image removes them
    elif any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        doubt = "16 bits a channel"
    elif image.mode not in _PLAIN_MODES:
        doubt = f"mode {image.mode}"
    elif (turn := (orientation or loaded_orientation)(image)) != 1:
        doubt = f"EXIF orientation {turn}"
    else:
        return
    raise ImageError(f"{name}: image_policy='strict' refuses {doubt}")


def loaded_orientation(image: Image.Image) -> int:
    """Load an image and return its EXIF orientation from 1 to 8; 1 if it has none."""
    # The orientation of a PNG may follow its pixels
    image.load()
    return known_orientation(image.getexif())


def known_orientation(exif: Image.Exif) -> int:
    """Return the orientation in ``exif``; 1 if it has none or an unknown one."""
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def scale_16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale integers from 0 … 65535 to 0 … 255, rounded to the nearest."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def scale_floats(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale floats from 0 … 1 to 0 … 255, rounded to the nearest."""
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def check_unit_range(low: Any, high: Any, name: str) -> None:
    """Check that floats from ``low`` to ``high`` are in [0, 1].

    Raises:
        ImageError: They are not, or ``low`` or ``high`` is NaN.
    """
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"{name}: floats must lie in [0, 1], got {float(low):g} to {float(high):g}"
        )


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose would also rewrite all of EXIF
    turn = _TURNS.get(loaded_orientation(image))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow cannot convert La to RGB, and transformers fails on it
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _shown(image: Image.Image, name: str) -> Image.Image:
    """Return an image in RGB as a viewer shows it on a white page.

    Raises:
        ImageError: A float is not in [0, 1], or an integer not in [0, 65535].
    """
    if image.mode == "F":
        floats = np.asarray(image)
        check_unit_range(floats.min(), floats.max(), name)
        return Image.fromarray(convert_in_parts(scale_floats, floats)).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(
                f"{name}: integers in mode {image.mode} must lie in [0, 65535], got {low} to {high}"
            )
        gray = convert_in_parts(scale_16_bits, values)
        gray[values == image.info.get("transparency")] = 255
        return Image.fromarray(gray).convert("RGB")
    return _on_white(image) if image.has_transparency_data else _rgb(image)


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image blended on white, in RGB.

    The image is blended part by part, because the steps hold five copies of a part.
    """
    page = Image.new("RGB", image.size)
    width = min(image.width, PART_PIXELS)
    height = max(1, PART_PIXELS // width)
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            right, bottom = min(left + width, image.width), min(top + height, image.height)
            box = left, top, right, bottom
            # `crop` would check a part against the process's limit for whole images
            part = image.resize((right - left, bottom - top), Image.Resampling.NEAREST, box)
            straight = part.convert(_STRAIGHT.get(part.mode, part.mode)).convert("RGBA")
            white = Image.new("RGBA", part.size, "white")
            page.paste(Image.alpha_composite(white, straight).convert("RGB"), box)
    return page
