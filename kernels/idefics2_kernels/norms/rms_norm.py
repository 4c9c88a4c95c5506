"""Root-mean-square norm, alone and after adding a residual.

A program holds whole rows in registers, several if they are short. The model rounds to its dtype
before it scales by the weight, and the kernel does the same.
"""

from dataclasses import asdict, dataclass

import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.dependent_launch import (
    LINE,
    dependent_options,
    gdc_launch_dependents,
    gdc_wait,
    prefetch,
)
from idefics2_kernels.norms.rows import make_norm_rows


@dataclass(frozen=True)
class LaunchConfig:
    """A tile of whole rows, and the warps that share it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


def launch_config(N: int) -> LaunchConfig:
    """Return the tile for rows of ``N`` columns."""
    # A thread holds 16 to 32 elements, which are two to four loads of 16 bytes. On an H100 the
    # kernel reaches 90 % of a copy's bandwidth at 8192 x 4096.
    BLOCK_N = max(128, triton.next_power_of_2(N))
    BLOCK_M = max(1, min(16, 2048 // BLOCK_N))
    return LaunchConfig(BLOCK_M, BLOCK_N, num_warps=4 if BLOCK_N <= 2048 else 8)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N), if HAS_RESIDUAL
    weight_ptr,  # (N,)
    out_ptr,  # (M, N), contiguous
    total_ptr,  # (M, N), contiguous, if HAS_RESIDUAL
    stride_x,
    stride_residual,
    M,
    N,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    gdc_launch_dependents(IS_DEPENDENT)
    if IS_DEPENDENT and tl.program_id(0) == 0:
        line: tl.constexpr = LINE // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        prefetch(weight_ptr + tl.minimum(tl.arange(0, BLOCK_N // line) * line, N - 1))
    gdc_wait(IS_DEPENDENT)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n

    # Each row is read once. It must not evict the weight, which every program reads.
    x = tl.load(
        x_ptr + offs_m * stride_x + offs_n, mask=mask, other=0.0, eviction_policy="evict_first"
    ).to(tl.float32)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
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
    # The plain operators may be off by two units in the last place. Correct rounding is cheap for
    # one number a row.
    mean_square = tl.div_rn(tl.sum(x * x, axis=1, keep_dims=True), tl.cast(N, tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    x_hat = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (x_hat * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m * N + offs_n, out, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide ``x`` (..., N) by its root mean square, round, and scale by ``weight`` (N,).

    The result is x / sqrt(mean(x^2) + ``eps``) * weight, computed in fp32 until the rounding. The
    last axis must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N) and return the ``rms_norm`` of the sum, and the sum.

    The sum is rounded before it is normalized.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    out, total = _launch(x, residual, weight, eps)
    assert total is not None
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    rows = make_norm_rows(x, residual, weight=weight)
    if rows.out.numel():
        M, N = rows.x.shape
        config = launch_config(N)
        _rms_norm_kernel[(triton.cdiv(M, config.BLOCK_M),)](
            rows.x,
            rows.residual,
            weight.contiguous(),
            rows.out,
            rows.total,
            *rows.strides,
            M,
            N,
            eps,
            HAS_RESIDUAL=residual is not None,
            **asdict(config),
            **dependent_options(),
        )
    return rows.out.view(x.shape), None if rows.total is None else rows.total.view(x.shape)
