"""Gradients of the dense product and of the product with NF4.

The products are cuBLAS's, which sums in a fixed order. A weight in NF4 does not train. It is
dequantized to a buffer first, and no activation is kept for it.
"""

from torch import Tensor

from idefics2_kernels.backward.column_sums import column_sums
from idefics2_kernels.gpu.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_rows,
    check_shape,
    flatten_rows,
)
from idefics2_kernels.nf4.nf4_quantize import nf4_dequantize
from idefics2_kernels.nf4.nf4_weight import NF4Weight


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, *, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x (..., K), ``weight`` (N, K) and bias (N,) from ``dy`` (..., N).

    The last two are ``None`` unless wanted. ``x`` may be ``None`` without ``weight_grad``. The last
    axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit, or ``x`` is missing.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    check_shape("weight", weight, (None, None))
    N, K = weight.shape
    check_dtype("weight", weight, *FLOATS)
    check_rows("weight", weight)
    _check_dy(dy, N, weight)
    check_device(dy=dy, weight=weight, x=x)
    rows = flatten_rows(dy)
    dx = (rows @ weight).view(*dy.shape[:-1], K)
    dweight = None
    if weight_grad:
        if x is None:
            raise ValueError("x must be given with weight_grad, got None")
        check_shape("x", x, (*dy.shape[:-1], K))
        check_dtype("x", x, weight.dtype)
        check_rows("x", x)
        dweight = rows.t() @ flatten_rows(x)
    return dx, dweight, column_sums(rows, dy.dtype) if bias_grad else None


def nf4_matmul_backward(dy: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply ``dy`` (..., N) by ``weight`` (N, K): the gradient of x (..., K) of ``nf4_matmul``.

    The last axis must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: The dtype of ``dy`` is not the weight's.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have two axes, got shape {weight.shape}")
    N, K = weight.shape
    _check_dy(dy, N, weight)
    check_device(dy=dy, weight=weight.codes)
    return (flatten_rows(dy) @ nf4_dequantize(weight)).view(*dy.shape[:-1], K)


def _check_dy(dy: Tensor, N: int, weight: Tensor | NF4Weight) -> None:
    if not dy.ndim:
        raise ValueError("dy must have an axis or more, got a scalar")
    check_shape("dy", dy, (*dy.shape[:-1], N))
    check_dtype("dy", dy, weight.dtype)
    check_rows("dy", dy)
