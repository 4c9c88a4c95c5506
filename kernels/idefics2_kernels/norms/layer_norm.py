"""Layer norm, alone and after adding a residual.

A program holds whole rows in registers, several if they are short. A row is held in two parts: a
power of two of columns, and the power of two that covers the rest. For example, 1152 columns are
held as 1024 + 128. Padding them to 2048 would waste nearly half of the loads. Rows of up to 2047
columns belong to one warp, so summing them needs no barrier.

The mean is subtracted before the squares are summed. A large mean therefore does not reduce the
precision of the variance.
"""

from dataclasses import asdict, dataclass
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.norms.rows import make_norm_rows


@dataclass(frozen=True)
class LaunchConfig:
    """A tile of whole rows, in two parts, and the warps that share it."""

    BLOCK_M: int
    # Columns of the first part, a power of two.
    BLOCK_N: int
    # Columns of the second part, or 0 if there is none.
    BLOCK_REST: int
    num_warps: int


@cache
def launch_config(N: int) -> LaunchConfig:
    """Return the tile for rows of ``N`` columns."""
    BLOCK_N = 1 << (N.bit_length() - 1)
    BLOCK_REST = triton.next_power_of_2(N - BLOCK_N) if BLOCK_N < N else 0
    # Summing a row within one warp needs no barrier.
    num_warps = 1 if BLOCK_N <= 1024 else 4 if BLOCK_N <= 4096 else 8
    return LaunchConfig(max(1, min(16, 512 // BLOCK_N)), BLOCK_N, BLOCK_REST, num_warps)


@triton.jit
def load_columns(
    ptr, rows, mask_m, N, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """Load columns ``FIRST`` to ``FIRST + WIDTH`` of rows; columns past N are 0 if MASKED."""
    offs_n = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = mask_m & (offs_n < N) if MASKED else mask_m
    # Each row is read once. It must not evict weight and bias, which every program reads.
    x = tl.load(ptr + rows + offs_n, mask=mask, other=0.0, eviction_policy="evict_first")
    return x.to(tl.float32)


@triton.jit
def store_columns(ptr, rows, x, mask_m, N, FIRST: tl.constexpr, MASKED: tl.constexpr):
    """Store columns ``FIRST`` to ``FIRST`` + the width of ``x``, but not those past N if MASKED."""
    offs_n = FIRST + tl.arange(0, x.shape[1])[None, :]
    mask = mask_m & (offs_n < N) if MASKED else mask_m
    tl.store(ptr + rows + offs_n, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_and_shift(x, weight_ptr, bias_ptr, N, FIRST: tl.constexpr, MASKED: tl.constexpr):
    offs_n = FIRST + tl.arange(0, x.shape[1])[None, :]
    if MASKED:
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0)
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    else:
        weight, bias = tl.load(weight_ptr + offs_n), tl.load(bias_ptr + offs_n)
    return x * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
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
    BLOCK_REST: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    mask_m = offs_m < M
    rows = offs_m * N

    x = load_columns(x_ptr, offs_m * stride_x, mask_m, N, 0, BLOCK_N, False)
    rest = x
    if BLOCK_REST > 0:
        rest = load_columns(x_ptr, offs_m * stride_x, mask_m, N, BLOCK_N, BLOCK_REST, True)
    if HAS_RESIDUAL:
        rows_r = offs_m * stride_residual
        x += load_columns(residual_ptr, rows_r, mask_m, N, 0, BLOCK_N, False)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        store_columns(total_ptr, rows, x, mask_m, N, 0, False)
        if BLOCK_REST > 0:
            rest += load_columns(residual_ptr, rows_r, mask_m, N, BLOCK_N, BLOCK_REST, True)
            rest = rest.to(total_ptr.dtype.element_ty).to(tl.float32)
            store_columns(total_ptr, rows, rest, mask_m, N, BLOCK_N, True)

    # The plain operators may be off by two units in the last place. Correct rounding is cheap for
    # one number a row.
    count = tl.cast(N, tl.float32)
    sum_x = tl.sum(x, axis=1, keep_dims=True)
    if BLOCK_REST > 0:
        sum_x += tl.sum(rest, axis=1, keep_dims=True)
    mean = tl.div_rn(sum_x, count)
    x -= mean
    squares = tl.sum(x * x, axis=1, keep_dims=True)
    if BLOCK_REST > 0:
        offs_rest = BLOCK_N + tl.arange(0, BLOCK_REST)[None, :]
        rest = tl.where(offs_rest < N, rest - mean, 0.0)
        squares += tl.sum(rest * rest, axis=1, keep_dims=True)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))

    out = _scale_and_shift(x * rstd, weight_ptr, bias_ptr, N, 0, False)
    store_columns(out_ptr, rows, out, mask_m, N, 0, False)
    if BLOCK_REST > 0:
        out = _scale_and_shift(rest * rstd, weight_ptr, bias_ptr, N, BLOCK_N, True)
        store_columns(out_ptr, rows, out, mask_m, N, BLOCK_N, True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize ``x`` (..., N) to mean 0 and variance 1, scale by ``weight``, add ``bias`` (N,).

    The result is (x - mean) / sqrt(variance + ``eps``) * weight + bias in fp32, rounded once. The
    last axis must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    return _launch(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N) and return the ``layer_norm`` of the sum, and the sum.

    The sum is rounded before it is normalized.

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
    rows = make_norm_rows(x, residual, weight=weight, bias=bias)
    if rows.out.numel():
        M, N = rows.x.shape
        config = launch_config(N)
        _layer_norm_kernel[(triton.cdiv(M, config.BLOCK_M),)](
            rows.x,
            rows.residual,
            weight.contiguous(),
            bias.contiguous(),
            rows.out,
            rows.total,
            *rows.strides,
            M,
            N,
            eps,
            HAS_RESIDUAL=residual is not None,
            **asdict(config),
        )
    return rows.out.view(x.shape), None if rows.total is None else rows.total.view(x.shape)
