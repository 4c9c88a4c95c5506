"""Layer norm, alone and after adding a residual: whole rows in registers, several to a program if short.

The mean is taken out before the squares are summed, so that a large mean costs no digits of the variance.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.checks import FLOATS, check_device, check_dtype, check_rows, check_shape


@dataclass(frozen=True)
class LaunchConfig:
    """A tile of whole rows, and the warps that share it."""

    block_m: int
    block_n: int
    num_warps: int


def _launch_config(N: int) -> LaunchConfig:
    # a thread holds 16 to 32 elements, two to four loads of 16 bytes; on an H100 72 % of a copy's bandwidth at 8192 x 1152
    block_n = max(128, triton.next_power_of_2(N))
    block_m = max(1, min(16, 2048 // block_n))
    return LaunchConfig(block_m, block_n, num_warps=4 if block_n <= 2048 else 8)


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N), if HAS_RESIDUAL
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    out_ptr,  # (M, N), contiguous
    total_ptr,  # (M, N), contiguous, if HAS_RESIDUAL
    stride_x,
    stride_residual,
    M,
    N,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n

    # what streams past must not push weight and bias, which every program reads, out of the cache
    x = tl.load(
        x_ptr + offs_m * stride_x + offs_n, mask=mask, other=0.0, eviction_policy="evict_first"
    ).to(tl.float32)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + offs_m * stride_residual + offs_n,
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offs_m * N + offs_n, total, mask=mask)
        x = total.to(tl.float32)
    # one number a row, so that correct rounding costs nothing; the plain operators may be off by two units in the last place
    mean = tl.div_rn(tl.sum(x, axis=1, keep_dims=True), tl.cast(N, tl.float32))
    centred = tl.where(mask_n, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=1, keep_dims=True), tl.cast(N, tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    out = (centred * rstd * weight + bias).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m * N + offs_n, out, mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise ``x`` (..., N) to mean 0 and variance 1, scale by ``weight`` (N,), add ``bias`` (N,).

    (x - mean) / sqrt(variance + ``eps``) * weight + bias, in fp32, rounded once. Any strides but a contiguous last
    axis.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    return _launch(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N); return the rounded sum's ``layer_norm`` and the sum.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    out, total = _launch(x, residual, weight, bias, eps)
    assert total is not None
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    N = x.shape[-1]
    check_dtype("x", x, *FLOATS)
    for name, vector in (("weight", weight), ("bias", bias)):
        check_shape(name, vector, (N,))
        check_dtype(name, vector, x.dtype)
    check_rows("x", x)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_dtype("residual", residual, x.dtype)
        check_rows("residual", residual)
    check_device(x=x, residual=residual, weight=weight, bias=bias)
    rows = x.reshape(-1, N)
    residual_rows = None if residual is None else residual.reshape(-1, N)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    if out.numel():
        config = _launch_config(N)
        _layer_norm_kernel[(triton.cdiv(rows.shape[0], config.block_m),)](
            rows,
            residual_rows,
            weight.contiguous(),
            bias.contiguous(),
            out,
            total,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            rows.shape[0],
            N,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return out.view(x.shape), None if total is None else total.view(x.shape)
