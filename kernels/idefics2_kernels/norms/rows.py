"""Argument checks and tensors shared by the wrappers of both norms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idefics2_kernels.gpu.checks import FLOATS, check_device, check_dtype, check_rows, check_shape


@dataclass(frozen=True)
class NormRows:
    """The arguments of a norm as rows (M, N), and its results."""

    x: Tensor
    residual: Tensor | None
    out: Tensor
    # The rounded sum of x and residual.
    total: Tensor | None

    @property
    def strides(self) -> tuple[int, int]:
        """Row strides of ``x`` and ``residual``, in elements."""
        return self.x.stride(0), 0 if self.residual is None else self.residual.stride(0)


def make_norm_rows(x: Tensor, residual: Tensor | None, **vectors: Tensor) -> NormRows:
    """Check the arguments of a norm and allocate its results.

    Args:
        x: Input (..., N).
        residual: Residual of the shape of ``x``, or ``None``.
        vectors: Weight and bias by name, (N,) each.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    N = x.shape[-1]
    check_dtype("x", x, *FLOATS)
    for name, vector in vectors.items():
        check_shape(name, vector, (N,))
        check_dtype(name, vector, x.dtype)
    check_rows("x", x)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_dtype("residual", residual, x.dtype)
        check_rows("residual", residual)
    check_device(x=x, residual=residual, **vectors)
    rows = x.reshape(-1, N)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return NormRows(
        rows,
        None if residual is None else residual.reshape(-1, N),
        out,
        None if residual is None else torch.empty_like(out),
    )
