"""Gradient of rotary positions: the same rotation by the opposite angle.

Each token has one program, as in ``rotary``.
"""

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import check_device
from idefics2_kernels.rotary import check_rotary, launch_config, rotate_heads


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _rotary_backward_kernel(
    dq_ptr,  # (T, H, D)
    dk_ptr,  # (T, H_KV, D)
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (positions, D): D/2 cosines, then D/2 sines
    dq_out_ptr,  # (T, H, D), contiguous
    dk_out_ptr,  # (T, H_KV, D), contiguous
    dq_strides,  # (token, head)
    dk_strides,  # (token, head)
    stride_cos_sin,
    H,
    H_KV,
    HALF,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HALF
    table = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * stride_cos_sin + offs_d
    cos = tl.load(table, mask=mask_d, other=0.0).to(tl.float32)
    sin = -tl.load(table + HALF, mask=mask_d, other=0.0).to(tl.float32)
    D = 2 * HALF
    dq_row, dk_row = dq_ptr + token * dq_strides[0], dk_ptr + token * dk_strides[0]
    dq_out_row, dk_out_row = dq_out_ptr + token * H * D, dk_out_ptr + token * H_KV * D
    rotate_heads(dq_row, dq_out_row, dq_strides[1], D, cos, sin, H, HALF, BLOCK_H, BLOCK_D)
    rotate_heads(dk_row, dk_out_row, dk_strides[1], D, cos, sin, H_KV, HALF, BLOCK_H, BLOCK_D)


def rotary_backward(
    dq: Tensor, dk: Tensor, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate ``dq`` (T, H, D) and ``dk`` (T, H_KV, D) back by their ``positions`` (T,).

    They are the gradients of the results of ``rotary``, and the results those of its arguments. The
    last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, ``dq`` and ``dk`` differ in dtype, or
            ``positions`` are not integers.
    """
    check_rotary(positions, cos_sin, dq=dq, dk=dk)
    check_device(dq=dq, dk=dk, positions=positions, cos_sin=cos_sin)
    dq_out, dk_out = (torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device) for x in (dq, dk))
    T, H, D = dq.shape
    if T:
        _rotary_backward_kernel[(T,)](
            dq,
            dk,
            positions.contiguous(),
            cos_sin,
            dq_out,
            dk_out,
            dq.stride()[:2],
            dk.stride()[:2],
            cos_sin.stride(0),
            H,
            dk.shape[1],
            D // 2,
            **asdict(launch_config(D // 2)),
        )
    return dq_out, dk_out
