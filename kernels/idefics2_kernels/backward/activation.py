"""Gradients of the gated SiLU, and of GELU in the tanh form.

A program computes a tile of a few rows and 512 columns, as the forward kernels do. With
s(x) = 1 / (1 + e^-x):

- silu(x) = x s(x) has the derivative s(x) + x s(x) (1 - s(x)).
- gelu(x) = x s(u(x)) with u(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3) has the derivative
  s(u) + x s(u) (1 - s(u)) u'(x).

Nothing is kept from the forward pass but its input.
"""

import math
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.activation import (
    GELU_CUBIC,
    GELU_SLOPE,
    launch_config,
    tile_of_program,
)
from idefics2_kernels.gpu.checks import FLOATS, check_device, check_dtype, check_rows, check_shape
from idefics2_kernels.gpu.primitives import LOG2_E

NATURAL_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
# From here on the derivative of GELU is 0 or 1 in fp32, and powers of x might overflow.
SATURATED = tl.constexpr(16.0)


@triton.jit
def _sigmoid(x):
    """Return s = 1 / (1 + 2^-x) and s (1 - s), both without cancellation or overflow."""
    power = tl.exp2(-tl.abs(x))
    large = 1.0 / (1.0 + power)
    small = power * large
    return tl.where(x < 0.0, small, large), small * large


@triton.jit(do_not_specialize=["M"])
def _silu_mul_backward_kernel(
    dy_ptr,  # (M, F)
    gate_up_ptr,  # (M, 2F): gate, then up
    dgate_up_ptr,  # (M, 2F), contiguous
    stride_dy,
    stride_gate_up,
    M,
    F,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m, offs_f, mask = tile_of_program(M, F, BLOCK_M, BLOCK_N)
    gate_ptrs = gate_up_ptr + offs_m * stride_gate_up + offs_f
    gate = tl.load(gate_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dy_ptrs = dy_ptr + offs_m * stride_dy + offs_f
    dy = tl.load(dy_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    share, change = _sigmoid(gate * LOG2_E)
    dgate = dy * up * (share + gate * change)
    dgate_ptrs = dgate_up_ptr + offs_m * (2 * F) + offs_f
    tl.store(dgate_ptrs, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    dup = dy * (gate * share)
    tl.store(dgate_ptrs + F, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gelu_tanh_backward_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    bias_ptr,  # (N,), if HAS_BIAS
    dx_ptr,  # (M, N), contiguous
    stride_dy,
    stride_x,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m, offs_n, mask = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    x_ptrs = x_ptr + offs_m * stride_x + offs_n
    x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dy_ptrs = dy_ptr + offs_m * stride_dy + offs_n
    dy = tl.load(dy_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    x = tl.clamp(x, -SATURATED, SATURATED, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    share, change = _sigmoid(x * GELU_SLOPE * (square * GELU_CUBIC + 1.0))
    slope = NATURAL_SLOPE * (1.0 + 3.0 * GELU_CUBIC * square)
    dx = dy * (share + x * slope * change)
    tl.store(dx_ptr + offs_m * N + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def silu_mul_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient of ``gate_up`` (..., 2F) from that of ``silu_mul``, ``dy`` (..., F).

    The last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit, or the last axis is odd.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    check_dtype("gate_up", gate_up, *FLOATS)
    check_rows("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last axis, got {tuple(gate_up.shape)}")
    F = gate_up.shape[-1] // 2
    check_shape("dy", dy, (*gate_up.shape[:-1], F))
    check_dtype("dy", dy, gate_up.dtype)
    check_rows("dy", dy)
    check_device(dy=dy, gate_up=gate_up)
    dgate_up = torch.empty(tuple(gate_up.shape), dtype=gate_up.dtype, device=gate_up.device)
    if dgate_up.numel():
        rows, drows = gate_up.reshape(-1, 2 * F), dy.reshape(-1, F)
        M, config = rows.shape[0], launch_config()
        _silu_mul_backward_kernel[
            (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(F, config.BLOCK_N),)
        ](
            drows,
            rows,
            dgate_up,
            drows.stride(0),
            rows.stride(0),
            M,
            F,
            **asdict(config),
        )
    return dgate_up


def gelu_tanh_backward(dy: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the gradient of ``x`` (..., N) from that of ``gelu_tanh``, ``dy`` (..., N).

    ``bias`` (N,) is added to ``x``. The last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    N = x.shape[-1]
    check_dtype("x", x, *FLOATS)
    check_rows("x", x)
    check_shape("dy", dy, tuple(x.shape))
    check_dtype("dy", dy, x.dtype)
    check_rows("dy", dy)
    if bias is not None:
        check_shape("bias", bias, (N,))
        check_dtype("bias", bias, x.dtype)
    check_device(dy=dy, x=x, bias=bias)
    dx = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if dx.numel():
        rows, drows = x.reshape(-1, N), dy.reshape(-1, N)
        M, config = rows.shape[0], launch_config()
        _gelu_tanh_backward_kernel[
            (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
        ](
            drows,
            rows,
            None if bias is None else bias.contiguous(),
            dx,
            drows.stride(0),
            rows.stride(0),
            M,
            N,
            HAS_BIAS=bias is not None,
            **asdict(config),
        )
    return dx
