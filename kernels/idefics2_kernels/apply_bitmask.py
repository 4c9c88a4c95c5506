"""Bars tokens in rows of logits, by one bit a token.

A program bars 2,048 tokens of one of the listed rows, so that a few rows use many SMs. It reads the
bits of its tokens, and reads and writes all their logits, in wide accesses. A logit is barred by adding
-inf to it, so NaN stays NaN, and infinity becomes NaN.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dtype,
    check_rows,
    check_shape,
)


@dataclass(frozen=True)
class LaunchConfig:
    """Words of 32 tokens of a program, and the warps that share them."""

    BLOCK_W: int
    num_warps: int


def launch_config(V: int) -> LaunchConfig:
    """Return the launch options for a vocabulary of ``V``."""
    return LaunchConfig(BLOCK_W=8, num_warps=1) if V <= 1024 else LaunchConfig(64, 4)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "bits_ptr"])
def _apply_bitmask_kernel(
    logits_ptr,  # (B, V)
    rows_ptr,  # (R,)
    bits_ptr,  # (R, W) int32, the lowest bit for the first of 32 tokens
    stride_logits,
    stride_bits,
    V,
    BLOCK_W: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    words_begin = tl.program_id(1) * BLOCK_W
    offs_w = words_begin + tl.arange(0, BLOCK_W)
    offs_bit = tl.arange(0, 32)
    row = tl.load(rows_ptr + place).to(tl.int64)
    words = tl.load(bits_ptr + place * stride_bits + offs_w, mask=offs_w * 32 < V, other=-1)
    barred = ((words[:, None] >> offs_bit[None, :]) & 1) == 0
    offs_v = offs_w[:, None] * 32 + offs_bit[None, :]
    logits_ptrs = logits_ptr + row * stride_logits + offs_v
    # A mask would keep the accesses of a whole block from being wide
    if (words_begin + BLOCK_W) * 32 <= V:
        logits = tl.load(logits_ptrs).to(tl.float32)
        tl.store(logits_ptrs, tl.where(barred, _barred(logits), logits))
    else:
        mask = barred & (offs_v < V)
        logits = tl.load(logits_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(logits_ptrs, _barred(logits), mask=mask)


@triton.jit
def _barred(logits):
    # What the sum with -inf is.
    return tl.where(logits < float("inf"), float("-inf"), float("nan"))


def apply_bitmask(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Bar the tokens of some rows of `logits` (B, V) whose bit is 0, by adding -inf, in place.

    Row ``rows[r]`` of the logits has the bits ``bits[r]``. Other rows are neither read nor written.
    The last axes of ``logits`` and ``bits`` must be contiguous.

    Args:
        logits: Logits (B, V).
        rows: Rows (R,) of the logits, each once.
        bits: Bits (R, W), W = ceil(V / 32). Token v is bit v % 32 of word v // 32, bit 0 being the
            lowest.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: ``logits`` are none of bf16, fp16, fp32, or ``rows`` are not integers, or
            ``bits`` are not int32.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, *FLOATS)
    check_rows("logits", logits)
    check_shape("rows", rows, (None,))
    check_dtype("rows", rows, *INTS)
    R, V = rows.shape[0], logits.shape[1]
    check_shape("bits", bits, (R, triton.cdiv(V, 32)))
    check_dtype("bits", bits, torch.int32)
    check_rows("bits", bits)
    check_device(logits=logits, rows=rows, bits=bits)
    if R and V:
        config = launch_config(V)
        _apply_bitmask_kernel[(R, triton.cdiv(V, 32 * config.BLOCK_W))](
            logits,
            rows.contiguous(),
            bits,
            logits.stride(0),
            bits.stride(0),
            V,
            **asdict(config),
        )
