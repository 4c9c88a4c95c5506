"""Argument checks that every wrapper makes before it launches a kernel.

Each check is one call. Its error names the argument, the value wanted and the value given.
"""

import math
import os

import torch
from torch import Tensor

# Triton reads the variable when a kernel is defined, and never again.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTS = (torch.int32, torch.int64)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the ``expected`` shape.

    ``None`` matches any size.
    """
    # The fast path: a layer of the model makes a dozen checks.
    if tensor.shape == expected:
        return
    same = tensor.ndim == len(expected) and all(
        e is None or e == size for e, size in zip(expected, tensor.shape, strict=True)
    )
    if not same:
        want = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape ({want}), got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ``TypeError`` unless ``tensor`` has one of the ``allowed`` dtypes."""
    if tensor.dtype not in allowed:
        want = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {want}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all ``tensors`` are on one CUDA device.

    If kernels are interpreted, they may all be on a CPU.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{first} must be on a CUDA device, got {device}; "
            "set TRITON_INTERPRET=1 before importing the kernels to interpret them on a CPU"
        )
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as {first} is, got {tensor.device}")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` unless the last axis of ``tensor`` is contiguous."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have a contiguous last axis, got strides {tensor.stride()}")


def check_product(x: Tensor) -> int:
    """Check ``x`` (..., K) of a product and return K.

    Raises:
        ValueError: ``x`` is a scalar, or its last axis is not contiguous.
        TypeError: ``x`` is none of bf16, fp16, fp32.
    """
    if not x.ndim:
        raise ValueError("x must have an axis or more, got a scalar")
    check_dtype("x", x, *FLOATS)
    check_rows("x", x)
    return x.shape[-1]


def check_bias(bias: Tensor | None, N: int, dtype: torch.dtype) -> None:
    """Check the ``bias`` (N,) of a product, if there is one.

    Raises:
        ValueError: A shape or stride does not fit.
        TypeError: Its dtype is not ``dtype``.
    """
    if bias is not None:
        check_shape("bias", bias, (N,))
        check_dtype("bias", bias, dtype)
        check_rows("bias", bias)


def flatten_rows(x: Tensor) -> Tensor:
    """Return ``x`` (..., K) as rows (M, K)."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
