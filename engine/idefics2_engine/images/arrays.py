"""Conversion of arrays and tensors of pixels to RGB images."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from idefics2_engine.caller_errors import caller_code
from idefics2_engine.errors import ImageError
from idefics2_engine.images.pixel_parts import Part, parts
from idefics2_engine.images.policy import (
    ImagePolicy,
    check_unit_range,
    scale_16_bits,
    scale_floats,
)

if TYPE_CHECKING:
    from torch import Tensor

# Arrays are gray, RGB, or RGB with alpha
_CHANNELS = (1, 3, 4)
_Index = tuple[slice, ...]


def is_tensor(value: object) -> "TypeGuard[Tensor]":
    """Return whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def array_rgb(
    array: npt.NDArray[Any], policy: ImagePolicy, max_pixels: int, name: str
) -> Image.Image:
    """Return an array as an RGB image.

    Args:
        array: (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4. If both the first and the last axis
            could be channels, ``parity`` reads the first as channels, as transformers does,
            ``correct`` reads the last, and ``strict`` refuses the array.
            All policies accept uint8. ``parity`` also accepts whole numbers from 0 to 255 of any
            type. ``correct`` and ``strict`` also accept floats in [0, 1]. ``correct`` also accepts
            bool, and uint16, which is scaled from 65535.
        policy: See ``ImagePolicy``. Four channels are blended on white, except that ``strict``
            refuses them.
        max_pixels: Largest H x W, checked before any value is read.
        name: Name of the array in error messages.

    Raises:
        ImageError: The array is masked, or its shape, its type or a value is not accepted.
    """
    with caller_code(name, ImageError):
        if isinstance(array, np.ma.MaskedArray):
            raise ImageError(f"{name}: must have no mask, got a masked array; fill it first")
        # A subclass's own methods may do anything, so they are not used
        plain = np.asarray(array)
    return _rgb(plain.shape, plain.__getitem__, policy, max_pixels, name, channels_lead=False)


def tensor_rgb(tensor: "Tensor", policy: ImagePolicy, max_pixels: int, name: str) -> Image.Image:
    """Return a tensor as an RGB image.

    Arguments and policies are those of ``array_rgb``. One rule differs: if both the first and the
    last axis could be channels, ``correct`` reads the first.

    Raises:
        ImageError: As in ``array_rgb``, or the tensor's values cannot be read, for example because
            it is sparse or on the meta device.
    """

    def read(index: _Index) -> npt.NDArray[Any]:
        try:
            host = tensor.detach()[index].cpu()
            # numpy has no bfloat16 and no 8-bit floats
            if host.is_floating_point() and host.element_size() < 4:
                host = host.float()
            values: npt.NDArray[Any] = host.numpy()
        except Exception:
            raise ImageError(
                f"{name}: must be a dense tensor with values, got {tensor.layout} of "
                f"{tensor.dtype} on {tensor.device}"
            ) from None
        return values

    with caller_code(name, ImageError):
        shape = tuple(tensor.shape)
    return _rgb(shape, read, policy, max_pixels, name, channels_lead=True)


def _rgb(
    shape: tuple[int, ...],
    read: Callable[[_Index], npt.NDArray[Any]],
    policy: ImagePolicy,
    max_pixels: int,
    name: str,
    channels_lead: bool,
) -> Image.Image:
    """Return the RGB image of an array of ``shape``, of which ``read`` returns any part."""
    axis = _channel_axis(shape, policy, name, channels_lead)
    channels = 1 if axis is None else shape[axis]
    height, width = shape[1:] if axis == 0 else shape[:2]
    if 0 in shape:
        raise ImageError(f"{name}: must have pixels, got shape {shape}")
    if height * width > max_pixels:
        raise ImageError(f"{name}: must have at most {max_pixels} pixels, got {width} x {height}")

    def pixels(part: Part) -> npt.NDArray[Any]:
        """Return a part of the pixels as (h, w, C)."""
        if axis == 0:
            return np.moveaxis(read((slice(None), *part)), 0, -1)
        return read(part) if axis == 2 else read(part)[:, :, None]

    dtype = pixels((slice(0), slice(0))).dtype
    if dtype.kind not in "buif":
        raise ImageError(f"{name}: must hold numbers, got {dtype}")
    if dtype == np.uint8 and channels != 4:
        values = pixels((slice(None), slice(None)))
    else:
        image = _ImageValues(pixels, height, width, channels, dtype, name)
        values = image.whole_numbers() if policy is ImagePolicy.PARITY else image.scaled(policy)
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(values[:, :, 0])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(values))


def _channel_axis(
    shape: tuple[int, ...], policy: ImagePolicy, name: str, channels_lead: bool
) -> int | None:
    """Return the axis of the channels, 0 or 2, or ``None`` for (H, W)."""
    # transformers refuses this shape, although there is only one way to read it
    if len(shape) == 2:
        return None
    first = len(shape) == 3 and shape[0] in _CHANNELS
    last = len(shape) == 3 and shape[2] in _CHANNELS
    if not first and not last:
        raise ImageError(
            f"{name}: must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, "
            f"got shape {shape}"
        )
    if first and last:
        if policy is ImagePolicy.STRICT:
            raise ImageError(
                f"{name}: image_policy='strict' refuses a shape with channels at either end, "
                f"got {shape}"
            )
        first = channels_lead or policy is ImagePolicy.PARITY
    return 0 if first else 2


@dataclass(frozen=True)
class _ImageValues:
    """Pixels that are converted part by part, so that only the uint8 result has the full size."""

    # Returns a part as (h, w, C)
    pixels: Callable[[Part], npt.NDArray[Any]]
    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    name: str

    def whole_numbers(self) -> npt.NDArray[np.uint8]:
        """Return the values of ``parity`` as uint8, (H, W, 1 or 3), with alpha blended on white.

        Raises:
            ImageError: A value is not a whole number from 0 to 255, or a float beside alpha is not
                in [0, 1].
        """
        if self.dtype.kind == "f":
            low, high = self._finite_range()
            if self.channels == 4 and not (low >= 0 and high <= 1):
                raise ImageError(f"{self.name}: floats with alpha must lie in [0, 1]")
        values = self._empty()
        whole, low, high = True, np.inf, -np.inf
        for part in self._parts():
            shown = _on_white(self.pixels(part))
            whole &= shown.dtype.kind != "f" or np.allclose(shown, np.trunc(shown))
            low, high = min(low, float(shown.min())), max(high, float(shown.max()))
            if whole and low >= 0 and high <= 255:
                values[part] = shown
        if whole and low >= 0 and high <= 255:
            return values
        if not whole and low >= 0 and high <= 1:
            raise ImageError(
                f"{self.name}: image_policy='parity' refuses floats in [0, 1], which transformers "
                "divides by 255 twice; pass uint8, or choose image_policy='correct'"
            )
        raise ImageError(
            f"{self.name}: must hold whole numbers from 0 to 255, got {low:g} to {high:g}"
        )

    def scaled(self, policy: ImagePolicy) -> npt.NDArray[np.uint8]:
        """Return the values scaled to 0 … 255, (H, W, 1 or 3), with alpha blended on white.

        Raises:
            ImageError: ``policy`` refuses the type or the alpha, or a float is not in [0, 1].
        """
        if policy is ImagePolicy.STRICT and self.channels == 4:
            raise ImageError(f"{self.name}: image_policy='strict' refuses transparency")
        scale = self._scale(policy)
        if self.dtype.kind == "f":
            check_unit_range(*self._finite_range(), self.name)
        values = self._empty()
        for part in self._parts():
            values[part] = _on_white(scale(self.pixels(part)))
        return values

    def _scale(self, policy: ImagePolicy) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.uint8]]:
        if self.dtype == np.uint8:
            return lambda pixels: pixels
        if self.dtype.kind == "f":
            return scale_floats
        if policy is ImagePolicy.CORRECT and self.dtype == np.uint16:
            return scale_16_bits
        if policy is ImagePolicy.CORRECT and self.dtype == np.bool_:
            return lambda pixels: pixels.astype(np.uint8) * np.uint8(255)
        strict = policy is ImagePolicy.STRICT
        wanted = "uint8 or float" if strict else "uint8, uint16, bool or float"
        raise ImageError(f"{self.name}: must be {wanted}, got {self.dtype}")

    def _finite_range(self) -> tuple[Any, Any]:
        """Return the least and the greatest value.

        Raises:
            ImageError: A value is NaN or infinite.
        """
        lows, highs = [], []
        for part in self._parts():
            pixels = self.pixels(part)
            lows.append(pixels.min())
            highs.append(pixels.max())
        # numpy's minima and maxima are NaN if any value is NaN
        low, high = np.min(lows), np.max(highs)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ImageError(f"{self.name}: must be finite, got NaN or infinity")
        return low, high

    def _parts(self) -> Iterator[Part]:
        return parts(self.height, self.width)

    def _empty(self) -> npt.NDArray[np.uint8]:
        return np.empty((self.height, self.width, min(self.channels, 3)), np.uint8)


def _on_white(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Blend (h, w, 4) pixels on white in transformers' arithmetic; return others unchanged."""
    if pixels.shape[2] != 4:
        return pixels
    real = pixels.dtype.kind == "f"
    white = 1.0 if real else 255
    alpha = pixels[:, :, 3:] / white
    blend = alpha * pixels[:, :, :3] + (1 - alpha) * white
    rounded: npt.NDArray[Any] = blend if real else np.round(blend)
    return rounded.astype(pixels.dtype)
