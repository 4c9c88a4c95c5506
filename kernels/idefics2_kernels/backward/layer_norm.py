"""Gradient of layer norm, with the residual's gradient added.

With r the reciprocal of a row's standard deviation, y = (x - mean(x)) r, and g = dy * weight:

    dx = r (g - mean(g) - y mean(g y)) + dsum
    dweight = sum of dy * y, dbias = sum of dy over all rows

A program holds whole rows in registers, in two parts as the forward kernel does. If the weight
trains, it loops over every n-th tile of rows, where n is the number of programs, and keeps the sums
of its part of dweight and dbias. ``column_sums`` adds the parts. Both orders are fixed.
"""

from dataclasses import asdict
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.backward.column_sums import column_sums
from idefics2_kernels.backward.norm_gradients import NormGradients, make_norm_gradients
from idefics2_kernels.gpu.target import current_arch
from idefics2_kernels.norms.layer_norm import LaunchConfig, load_columns, store_columns

# Programs that sum the gradients of weight and bias, at most: four on each SM of an H100.
PROGRAMS = 528


@cache
def launch_config(N: int, arch: int) -> LaunchConfig:
    """Return the tile for rows of ``N`` columns."""
    BLOCK_N = 1 << (N.bit_length() - 1)
    BLOCK_REST = triton.next_power_of_2(N - BLOCK_N) if BLOCK_N < N else 0
    # On an H200, 39200 x 1152 takes 99.8 us with a row a warp, 117 us with a row two warps, and
    # 220 us with four rows four warps. For sm_80 a row a warp does not fit the registers.
    num_warps = (
        (1 if arch >= 90 else 2)
        if BLOCK_N <= 1024
        else 4
        if BLOCK_N <= 2048
        else 8
        if BLOCK_N <= 4096
        else 16
    )
    return LaunchConfig(max(1, min(16, 512 // BLOCK_N)), BLOCK_N, BLOCK_REST, num_warps)


@triton.jit
def _weighted(dy, weight_ptr, N, FIRST: tl.constexpr, MASKED: tl.constexpr):
    offs_n = FIRST + tl.arange(0, dy.shape[1])[None, :]
    if MASKED:
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0)
    else:
        weight = tl.load(weight_ptr + offs_n)
    return dy * weight.to(tl.float32)


@triton.jit
def _add_column_sums(ptr, sums, N, FIRST: tl.constexpr, MASKED: tl.constexpr):
    """Store the sums of a program's rows in its row of (programs, N)."""
    offs_n = FIRST + tl.arange(0, sums.shape[1])[None, :]
    ptrs = ptr + tl.program_id(0).to(tl.int64) * N + offs_n
    if MASKED:
        tl.store(ptrs, tl.sum(sums, axis=0, keep_dims=True), mask=offs_n < N)
    else:
        tl.store(ptrs, tl.sum(sums, axis=0, keep_dims=True))


@triton.jit(do_not_specialize=["M"])
def _layer_norm_backward_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    weight_ptr,  # (N,)
    dsum_ptr,  # (M, N), if HAS_SUM
    dx_ptr,  # (M, N), contiguous
    dweight_ptr,  # (programs, N) fp32, contiguous, if WEIGHT_GRAD
    dbias_ptr,  # (programs, N) fp32, contiguous, if WEIGHT_GRAD
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
    BLOCK_REST: tl.constexpr,
):
    WIDTH_REST: tl.constexpr = BLOCK_REST if BLOCK_REST > 0 else 1
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dweight_rest = tl.zeros((BLOCK_M, WIDTH_REST), tl.float32)
    dbias, dbias_rest = dweight, dweight_rest
    count = tl.cast(N, tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask_m = offs_m < M
        rows_x, rows_dy = offs_m * stride_x, offs_m * stride_dy
        x = load_columns(x_ptr, rows_x, mask_m, N, 0, BLOCK_N, False)
        dy = load_columns(dy_ptr, rows_dy, mask_m, N, 0, BLOCK_N, False)
        rest, dy_rest = dweight_rest, dweight_rest
        sum_x = tl.sum(x, axis=1, keep_dims=True)
        if BLOCK_REST > 0:
            rest = load_columns(x_ptr, rows_x, mask_m, N, BLOCK_N, BLOCK_REST, True)
            dy_rest = load_columns(dy_ptr, rows_dy, mask_m, N, BLOCK_N, BLOCK_REST, True)
            sum_x += tl.sum(rest, axis=1, keep_dims=True)
        # One number a row is rounded correctly, as in the forward pass.
        mean = tl.div_rn(sum_x, count)
        x -= mean
        squares = tl.sum(x * x, axis=1, keep_dims=True)
        if BLOCK_REST > 0:
            offs_rest = BLOCK_N + tl.arange(0, BLOCK_REST)[None, :]
            rest = tl.where(offs_rest < N, rest - mean, 0.0)
            squares += tl.sum(rest * rest, axis=1, keep_dims=True)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))
        y, g = x * rstd, _weighted(dy, weight_ptr, N, 0, False)
        sum_g = tl.sum(g, axis=1, keep_dims=True)
        sum_gy = tl.sum(g * y, axis=1, keep_dims=True)
        y_rest, g_rest = y, g
        if BLOCK_REST > 0:
            y_rest, g_rest = rest * rstd, _weighted(dy_rest, weight_ptr, N, BLOCK_N, True)
            sum_g += tl.sum(g_rest, axis=1, keep_dims=True)
            sum_gy += tl.sum(g_rest * y_rest, axis=1, keep_dims=True)
        mean_g, mean_gy = tl.div_rn(sum_g, count), tl.div_rn(sum_gy, count)
        dx = rstd * (g - mean_g - y * mean_gy)
        rows_sum = offs_m * stride_dsum
        if HAS_SUM:
            dx += load_columns(dsum_ptr, rows_sum, mask_m, N, 0, BLOCK_N, False)
        store_columns(dx_ptr, offs_m * N, dx, mask_m, N, 0, False)
        if BLOCK_REST > 0:
            dx_rest = rstd * (g_rest - mean_g - y_rest * mean_gy)
            if HAS_SUM:
                dx_rest += load_columns(dsum_ptr, rows_sum, mask_m, N, BLOCK_N, BLOCK_REST, True)
            store_columns(dx_ptr, offs_m * N, dx_rest, mask_m, N, BLOCK_N, True)
        if WEIGHT_GRAD:
            dweight += dy * y
            dbias += dy
            if BLOCK_REST > 0:
                dweight_rest += dy_rest * y_rest
                dbias_rest += dy_rest
    if WEIGHT_GRAD:
        _add_column_sums(dweight_ptr, dweight, N, 0, False)
        _add_column_sums(dbias_ptr, dbias, N, 0, False)
        if BLOCK_REST > 0:
            _add_column_sums(dweight_ptr, dweight_rest, N, BLOCK_N, True)
            _add_column_sums(dbias_ptr, dbias_rest, N, BLOCK_N, True)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dsum: Tensor | None = None,
    *,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of ``x`` (..., N), ``weight`` and ``bias`` (N,) of ``layer_norm``.

    ``dy`` (..., N) is the gradient of its result. ``dsum`` (..., N) is a further gradient of ``x``,
    which is added: for ``add_layer_norm``, ``x`` is the sum and ``dsum`` its own gradient. The
    other results are ``None`` without ``weight_grad``. The last axes must be contiguous. Other
    strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = make_norm_gradients(dy, x, dsum, weight=weight, bias=bias)
    N = x.shape[-1]
    tiles = triton.cdiv(rows.x.shape[0], launch_config(N, current_arch()).BLOCK_M)
    if not weight_grad:
        if rows.dx.numel():
            _launch(rows, weight, eps, None, tiles)
        return rows.dx.view(x.shape), None, None
    parts = torch.empty((2, min(tiles, PROGRAMS), N), dtype=torch.float32, device=x.device)
    if rows.dx.numel():
        _launch(rows, weight, eps, parts, parts.shape[1])
    dweight, dbias = (column_sums(part, weight.dtype) for part in parts)
    return rows.dx.view(x.shape), dweight, dbias


def _launch(
    rows: NormGradients, weight: Tensor, eps: float, parts: Tensor | None, programs: int
) -> None:
    M, N = rows.x.shape
    _layer_norm_backward_kernel[(programs,)](
        rows.dy,
        rows.x,
        weight.contiguous(),
        rows.dsum,
        rows.dx,
        *((None, None) if parts is None else parts),
        *rows.strides,
        M,
        N,
        eps,
        HAS_SUM=rows.dsum is not None,
        WEIGHT_GRAD=parts is not None,
        # With one column, g is its own mean. A fused multiply-add would subtract the rounded mean
        # from the exact product, and 1 / sqrt(eps) would scale the rounding up.
        enable_fp_fusion=rows.x.dtype != torch.float32,
        **asdict(launch_config(N, current_arch())),
    )
