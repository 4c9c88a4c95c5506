"""Root-mean-square norm, alone and after adding a residual: one program a row, the whole row in registers.

The model rounds to its dtype before it scales by the weight, and so does the kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.checks import FLOATS, check_device, check_dtype, check_rows, check_shape


def _num_warps(N: int) -> int:
    return 4 if N <= 2048 else 8


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N), if HAS_RESIDUAL
    weight_ptr,  # (N,)
    out_ptr,  # (M, N), contiguous
    total_ptr,  # (M, N), contiguous, if HAS_RESIDUAL
    stride_x,
    stride_residual,
    N,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    x = tl.load(x_ptr + row * stride_x + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + offs_n, mask=mask_n, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * N + offs_n, total, mask=mask_n)
        x = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / N + eps)
    x_hat = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, (x_hat * weight).to(out_ptr.dtype.element_ty), mask=mask_n)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide ``x`` (..., N) by its root mean square, round, and scale by ``weight`` (N,).

    x / sqrt(mean(x^2) + ``eps``) * weight, in fp32 until the rounding. Any strides but a contiguous last axis.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or ``weight``'s is not ``x``'s.
    """
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N); return the rounded sum's ``rms_norm`` and the sum.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    check_shape("residual", residual, tuple(x.shape))
    check_dtype("residual", residual, x.dtype)
    check_rows("residual", residual)
    out, total = _launch(x, residual, weight, eps)
    assert total is not None
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    N = x.shape[-1]
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, (N,))
    check_dtype("weight", weight, x.dtype)
    check_rows("x", x)
    check_device(x=x, residual=residual, weight=weight)
    rows = x.reshape(-1, N)
    residual_rows = None if residual is None else residual.reshape(-1, N)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    if out.numel():
        _rms_norm_kernel[(rows.shape[0],)](
            rows,
            residual_rows,
            weight.contiguous(),
            out,
            total,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            N,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK_N=triton.next_power_of_2(N),
            num_warps=_num_warps(N),
        )
    return out.view(x.shape), None if total is None else total.view(x.shape)
