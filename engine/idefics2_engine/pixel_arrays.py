"""Arrays and tensors of pixels to RGB pictures, by one rule for shapes and one for values."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from idefics2_engine.errors import ImageError
from idefics2_engine.image_policy import ImagePolicy, scale_16_bits, scale_floats

if TYPE_CHECKING:
    from torch import Tensor

_CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha


def is_tensor(value: object) -> "TypeGuard[Tensor]":
    """Tell a torch tensor, without importing torch: where there is a tensor, somebody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def tensor_array(tensor: "Tensor", name: str) -> npt.NDArray[Any]:
    """Return the tensor's values on the host; bfloat16, which numpy lacks, as float32.

    Raises:
        ImageError: They cannot be had, as from a sparse tensor or one on the meta device.
    """
    try:
        host = tensor.detach().cpu()
        if host.is_floating_point() and host.element_size() < 4:
            host = host.float()
        array: npt.NDArray[Any] = host.numpy()
    except (RuntimeError, TypeError, NotImplementedError):
        raise ImageError(
            f"{name}: must be a dense tensor with values, got {tensor.layout} of {tensor.dtype} "
            f"on {tensor.device}"
        ) from None
    return array


def array_rgb(
    array: npt.NDArray[Any],
    policy: ImagePolicy,
    max_pixels: int,
    name: str,
    channels_lead: bool = False,
) -> Image.Image:
    """Return an array as an RGB picture.

    Args:
        array: (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4. Where both ends could be channels,
            ``parity`` takes the first, as transformers does, ``correct`` what ``channels_lead``
            says, and ``strict`` refuses.
            Values: uint8; under ``correct`` and ``strict`` floats in [0, 1]; under ``correct``
            uint16 of 65535 and bool; under ``parity`` whole numbers from 0 to 255 of any type.
        policy: See ``image_policy``; four channels are blended on white, and refused by ``strict``.
        max_pixels: Largest H x W.
        name: What messages call the array.
        channels_lead: Whether arrays of this kind usually have their channels first.

    Raises:
        ImageError: The shape or a value is none of these.
    """
    pixels = _channels_last(array, policy, name, channels_lead)
    height, width, channels = pixels.shape
    if 0 in pixels.shape:
        raise ImageError(f"{name}: must have pixels, got shape {array.shape}")
    if height * width > max_pixels:
        raise ImageError(f"{name}: must have at most {max_pixels} pixels, got {width} x {height}")
    if array.dtype.kind not in "buif":
        raise ImageError(f"{name}: must hold numbers, got {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ImageError(f"{name}: must be finite, got NaN or infinity")
    if policy is ImagePolicy.PARITY:
        values = _whole_numbers(_on_white(pixels, name), name)
    elif policy is ImagePolicy.STRICT and channels == 4:
        raise ImageError(f"{name}: image_policy='strict' refuses transparency")
    else:
        values = _on_white(_scaled(pixels, policy, name), name)
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(values[:, :, 0])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(values))


def _channels_last(
    array: npt.NDArray[Any], policy: ImagePolicy, name: str, channels_lead: bool
) -> npt.NDArray[Any]:
    if array.ndim == 2:  # transformers refuses these: there is only one way to read them
        return array[:, :, None]
    first = array.ndim == 3 and array.shape[0] in _CHANNELS
    last = array.ndim == 3 and array.shape[2] in _CHANNELS
    if not first and not last:
        raise ImageError(
            f"{name}: must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, "
            f"got shape {array.shape}"
        )
    if first and last:
        if policy is ImagePolicy.STRICT:
            raise ImageError(
                f"{name}: image_policy='strict' refuses a shape with channels at either end, "
                f"got {array.shape}"
            )
        first = channels_lead or policy is ImagePolicy.PARITY
    return np.moveaxis(array, 0, -1) if first else array


def _on_white(pixels: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Blend the fourth channel away, in transformers' arithmetic."""
    if pixels.shape[2] != 4:
        return pixels
    real = pixels.dtype.kind == "f"
    if real and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ImageError(f"{name}: floats with alpha must lie in [0, 1]")
    white = 1.0 if real else 255
    alpha = pixels[:, :, 3:] / white
    blend = alpha * pixels[:, :, :3] + (1 - alpha) * white
    rounded: npt.NDArray[Any] = blend if real else np.round(blend)
    return rounded.astype(pixels.dtype)


def _whole_numbers(pixels: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Return values that transformers takes for 0 … 255."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    whole = pixels.dtype.kind != "f" or bool(np.allclose(pixels, np.trunc(pixels)))
    if whole and low >= 0 and high <= 255:
        return pixels.astype(np.uint8)
    if not whole and low >= 0 and high <= 1:
        raise ImageError(
            f"{name}: image_policy='parity' refuses floats in [0, 1], which transformers divides "
            "by 255 twice; pass uint8, or choose image_policy='correct'"
        )
    raise ImageError(f"{name}: must hold whole numbers from 0 to 255, got {low:g} to {high:g}")


def _scaled(pixels: npt.NDArray[Any], policy: ImagePolicy, name: str) -> npt.NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "f":
        return scale_floats(pixels, name)
    if policy is ImagePolicy.CORRECT and pixels.dtype == np.uint16:
        return scale_16_bits(pixels)
    if policy is ImagePolicy.CORRECT and pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    wanted = "uint8 or float" if policy is ImagePolicy.STRICT else "uint8, uint16, bool or float"
    raise ImageError(f"{name}: must be {wanted}, got {pixels.dtype}")
