"""Gradients of the product with a low-rank product beside it, whose base does not train.

All products are cuBLAS's, which sums in a fixed order. The low-rank part of dx is added where the
base's part is. x @ a.T is computed again, so that x is all that is kept, once for all projections
that share it.
"""

from torch import Tensor

from idefics2_kernels.backward.products import nf4_matmul_backward
from idefics2_kernels.gpu.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_rows,
    check_shape,
    flatten_rows,
)
from idefics2_kernels.nf4.nf4_weight import NF4Weight


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    pair_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x (..., K), ``a`` (R, K) and ``b`` (N, R) from ``dy`` (..., N).

    The last two are ``None`` without ``pair_grad``, and ``x`` may be. dy @ b and x @ a.T are
    rounded. The last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit, or ``x`` is missing.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    _check(dy, base, a, b)
    rows, K = flatten_rows(dy), a.shape[1]
    dxa = rows @ b
    dx = nf4_matmul_backward(rows, base) if isinstance(base, NF4Weight) else rows @ base
    dx.addmm_(dxa, a, alpha=scale)
    dx = dx.view(*dy.shape[:-1], K)
    if not pair_grad:
        return dx, None, None
    if x is None:
        raise ValueError("x must be given with pair_grad, got None")
    check_shape("x", x, (*dy.shape[:-1], K))
    check_dtype("x", x, dy.dtype)
    check_rows("x", x)
    check_device(dy=dy, x=x)
    kept = flatten_rows(x)
    return dx, _scaled(dxa.t(), kept, scale), _scaled(rows.t(), kept @ a.t(), scale)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``scale`` times the product, rounded once."""
    out = left.new_zeros(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scale)


def _check(dy: Tensor, base: Tensor | NF4Weight, a: Tensor, b: Tensor) -> None:
    if not dy.ndim:
        raise ValueError("dy must have an axis or more, got a scalar")
    check_dtype("dy", dy, *FLOATS)
    check_rows("dy", dy)
    N = dy.shape[-1]
    check_shape("a", a, (None, None))
    check_shape("b", b, (N, a.shape[0]))
    wanted = (N, a.shape[1])
    if tuple(base.shape) != wanted:
        raise ValueError(f"base must have shape {wanted}, got {tuple(base.shape)}")
    if base.dtype is not dy.dtype:
        expected, got = (str(dtype).removeprefix("torch.") for dtype in (dy.dtype, base.dtype))
        raise TypeError(f"base must be {expected}, got {got}")
    for name, matrix in (("a", a), ("b", b)):
        check_dtype(name, matrix, dy.dtype)
        check_rows(name, matrix)
    if isinstance(base, Tensor):
        check_rows("base", base)
    weight = base.codes if isinstance(base, NF4Weight) else base
    check_device(dy=dy, base=weight, a=a, b=b)
