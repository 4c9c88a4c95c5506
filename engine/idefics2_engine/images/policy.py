"""Policies for ambiguous images: alpha, rotation, 16 bits, floats and several frames.

Only this module implements them for Pillow images; ``arrays`` implements them for arrays.
"""

import warnings
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
    """As transformers' processor: alpha channels dropped, 16 bits saturate, the first frame without a word."""
    CORRECT = "correct"
    """As a viewer would show it: alpha on white, 16 bits and floats scaled, a warning for more frames."""
    STRICT = "strict"
    """An error for every image that leaves a choice."""

    @classmethod
    def named(cls, name: str) -> "ImagePolicy":
        """Return the policy of that name.

        Raises:
            ConfigError: There is none.
        """
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(repr(policy.value) for policy in cls)
            raise ConfigError(f"image_policy must be one of {names}, got {name!r}") from None


def upright_rgb(image: Image.Image, policy: ImagePolicy, name: str) -> Image.Image:
    """Return the image upright and in RGB, as ``policy`` says.

    The image itself is returned if it is so already.

    Raises:
        ImageError: The policy refuses the image. What Pillow raises comes through as it is.
    """
    if policy is ImagePolicy.PARITY:
        rgb = _rgb(_upright(image))
        # Alpha is gone, but a transparent color is still known, and transformers' second step sees
        # it
        return rgb if rgb.info.get("transparency") is None else _on_white(rgb)
    # Loading may move to another frame, so this is read before
    several = getattr(image, "is_animated", False)
    if policy is ImagePolicy.STRICT:
        _refuse_doubtful(image, several, name)
        return _rgb(image)
    if several:
        warnings.warn(
            f"{name}: has several frames or pages, only the current one is read",
            ImageWarning,
            stacklevel=2,
        )
    return _shown(_upright(image), name)


def scale_16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return 0 … 65535 as 0 … 255, rounded to the nearest."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def scale_floats(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return 0 … 1 as 0 … 255, rounded to the nearest."""
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def check_unit_range(low: Any, high: Any, name: str) -> None:
    """Raise ``ImageError`` if floats from ``low`` to ``high`` do not lie in [0, 1].

    NaN does not.
    """
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"{name}: floats must lie in [0, 1], got {float(low):g} to {float(high):g}"
        )


def _orientation(image: Image.Image) -> int:
    # The orientation of a PNG may follow its pixels
    image.load()
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose would rewrite all of EXIF
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow has no way from here, and transformers fails
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _refuse_doubtful(image: Image.Image, several: bool, name: str) -> None:
    if several:
        doubt = "several frames or pages"
    elif image.has_transparency_data:
        doubt = "transparency"
    elif any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):  # not read yet
        doubt = "16 bits a channel"
    elif image.mode not in _PLAIN_MODES:
        doubt = f"mode {image.mode}"
    elif _orientation(image) != 1:
        doubt = f"EXIF orientation {_orientation(image)}"
    else:
        return
    raise ImageError(f"{name}: image_policy='strict' refuses {doubt}")


def _shown(image: Image.Image, name: str) -> Image.Image:
    """Return in RGB what a viewer shows on a white page."""
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
    """Return the image on a white page, part by part: the steps hold five copies of a part."""
    page = Image.new("RGB", image.size)
    width = min(image.width, PART_PIXELS)
    height = max(1, PART_PIXELS // width)
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            right, bottom = min(left + width, image.width), min(top + height, image.height)
            box = left, top, right, bottom
            # Not `crop`, which holds parts to the process's limit for whole images
            part = image.resize((right - left, bottom - top), Image.Resampling.NEAREST, box)
            straight = part.convert(_STRAIGHT.get(part.mode, part.mode)).convert("RGBA")
            white = Image.new("RGBA", part.size, "white")
            page.paste(Image.alpha_composite(white, straight).convert("RGB"), box)
    return page
