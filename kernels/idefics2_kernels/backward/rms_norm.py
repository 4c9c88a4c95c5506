"""Gradient of the root-mean-square norm, with the residual's gradient added.

With r the reciprocal of a row's root mean square, y = x r, and g = dy * weight:

    dx = r (g - y mean(g y)) + dsum    dweight = sum of dy * y over all rows

A program holds whole rows in registers, several if they are short. If the weight trains, it loops
over every n-th tile of rows, where n is the number of programs, and keeps the sum of its part of
dweight. ``column_sums`` adds the parts. Both orders are fixed.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.backward.column_sums import column_sums
from idefics2_kernels.backward.norm_gradients import NormGradients, make_norm_gradients

# Programs that sum the weight's gradient, at most: two on each SM of an H100 or H200. On an H200
# 8192 x 4096 takes 98.9 us, and 102 us with 528.
PROGRAMS = 264


@dataclass(frozen=True)
class LaunchConfig:
    """A tile of whole rows, and the warps that share it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


def launch_config(N: int) -> LaunchConfig:
    """Return the tile for rows of ``N`` columns."""
    BLOCK_N = max(128, triton.next_power_of_2(N))
    BLOCK_M = max(1, min(16, 2048 // BLOCK_N))
    # On an H200, 8192 x 4096 takes 74.7 us with 4 warps, and 81.2 us with 8.
    return LaunchConfig(BLOCK_M, BLOCK_N, 4 if BLOCK_N <= 4096 else 8 if BLOCK_N <= 8192 else 16)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    weight_ptr,  # (N,)
    dsum_ptr,  # (M, N), if HAS_SUM
    dx_ptr,  # (M, N), contiguous
    dweight_ptr,  # (programs, N) fp32, contiguous, if WEIGHT_GRAD
    stride_dy,
    stride_x,
    stride_dsum,
    M,
    N,
    eps,
    HAS_SUM: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.cast(N, tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (offs_m < M) & mask_n
        # Each row is read once. It must not evict the weight, which every program reads.
        x = tl.load(
            x_ptr + offs_m * stride_x + offs_n, mask=mask, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        dy = tl.load(
            dy_ptr + offs_m * stride_dy + offs_n,
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        # One number a row is rounded correctly, as in the forward pass.
        mean_square = tl.div_rn(tl.sum(x * x, axis=1, keep_dims=True), count)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
        y = x * rstd
        g = dy * weight
        dx = rstd * (g - y * tl.div_rn(tl.sum(g * y, axis=1, keep_dims=True), count))
        if HAS_SUM:
            dsum_ptrs = dsum_ptr + offs_m * stride_dsum + offs_n
            dsum = tl.load(dsum_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + offs_m * N + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            dweight += dy * y
    if WEIGHT_GRAD:
        parts = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * N + offs_n, parts, mask=mask_n)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    dsum: Tensor | None = None,
    *,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``x`` (..., N) and ``weight`` (N,) of ``rms_norm`` from ``dy``.

    ``dsum`` (..., N) is a further gradient of ``x``, which is added: for ``add_rms_norm``, ``x`` is
    the sum and ``dsum`` its own gradient. The second result is ``None`` without ``weight_grad``.
    The last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = make_norm_gradients(dy, x, dsum, weight=weight)
    N = x.shape[-1]
    tiles = triton.cdiv(rows.x.shape[0], launch_config(N).BLOCK_M)
    if not weight_grad:
        if rows.dx.numel():
            _launch(rows, weight, eps, None, tiles)
        return rows.dx.view(x.shape), None
    parts = torch.empty((min(tiles, PROGRAMS), N), dtype=torch.float32, device=x.device)
    if rows.dx.numel():
        _launch(rows, weight, eps, parts, parts.shape[0])
    return rows.dx.view(x.shape), column_sums(parts, weight.dtype)


def _launch(
    rows: NormGradients, weight: Tensor, eps: float, parts: Tensor | None, programs: int
) -> None:
    M, N = rows.x.shape
    _rms_norm_backward_kernel[(programs,)](
        rows.dy,
        rows.x,
        weight.contiguous(),
        rows.dsum,
        rows.dx,
        parts,
        *rows.strides,
        M,
        N,
        eps,
        HAS_SUM=rows.dsum is not None,
        WEIGHT_GRAD=parts is not None,
        **asdict(launch_config(N)),
    )
