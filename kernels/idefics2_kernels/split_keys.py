"""Softmax over keys that several programs share: what each leaves behind, and the sum of it.

Where a row's output would be one program's alone but its keys are many, ``num_splits`` programs take some each and
store their state; a second kernel merges the states in order, so that results do not depend on who came first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention_tiles import LOWEST, normalised, store_head

MAX_SPLITS = 32  # a program of the second kernel takes all of a row's at once


@triton.jit
def store_state(
    out_ptr,  # (R, D), if not IS_SPLIT
    acc_ptr,  # (R, num_splits, D) fp32, if IS_SPLIT
    m_ptr,  # (R, num_splits) fp32, if IS_SPLIT
    l_ptr,  # (R, num_splits) fp32, if IS_SPLIT
    rows,  # (ROWS,) int64: which of R
    mask,  # (ROWS,)
    split,
    num_splits,
    state,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Store the output of ``rows``, or the state that one of several splits has for them."""
    if IS_SPLIT:
        acc, acc_rest, m_i, l_i = state
        places = rows * num_splits + split
        tl.store(m_ptr + places, m_i, mask=mask)
        tl.store(l_ptr + places, l_i, mask=mask)
        seen = mask & (l_i != 0.0)
        store_head(acc_ptr, places * D, seen, (acc, acc_rest), D, D_MAIN, D_REST)
    else:
        store_head(
            out_ptr, rows * D, mask, normalised(state, out_ptr.dtype.element_ty), D, D_MAIN, D_REST
        )


@triton.jit(do_not_specialize=["R", "num_splits"])
def _combine_kernel(
    acc_ptr,  # (R, num_splits, D)
    m_ptr,  # (R, num_splits)
    l_ptr,  # (R, num_splits)
    out_ptr,  # (R, D)
    R,
    num_splits,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    places = rows[:, None] * num_splits + offs_s
    mask = (rows < R)[:, None] & (offs_s < num_splits)
    m = tl.load(m_ptr + places, mask=mask, other=LOWEST)
    l = tl.load(l_ptr + places, mask=mask, other=0.0)
    acc = tl.load(
        acc_ptr + places[:, :, None] * D + offs_d[None, None, :],
        mask=(l != 0.0)[:, :, None] & mask_d[None, None, :],  # a split that saw no key stored none
        other=0.0,
    )
    weights = tl.exp2(m - tl.max(m, axis=1)[:, None])
    l_i = tl.sum(l * weights, axis=1)
    total = tl.sum(acc * weights[:, :, None], axis=1)
    out = tl.div_rn(total, tl.where(l_i == 0.0, 1.0, l_i)[:, None])
    tl.store(
        out_ptr + rows[:, None] * D + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < R)[:, None] & mask_d[None, :],
    )


def state_buffers(
    out: Tensor, num_splits: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate what ``num_splits`` programs leave for each row of ``out`` (..., D); nothing for one."""
    if num_splits == 1:
        return None, None, None
    D = out.shape[-1]
    rows = out.numel() // D
    return (
        torch.empty((rows, num_splits, D), dtype=torch.float32, device=out.device),
        torch.empty((rows, num_splits), dtype=torch.float32, device=out.device),
        torch.empty((rows, num_splits), dtype=torch.float32, device=out.device),
    )


def combine(acc: Tensor, m: Tensor, l: Tensor, out: Tensor) -> None:
    """Merge ``acc`` (R, num_splits, D), ``m`` and ``l`` (R, num_splits) into ``out``, R rows of D."""
    R, num_splits, D = acc.shape
    BLOCK_S, BLOCK_D = triton.next_power_of_2(num_splits), triton.next_power_of_2(D)
    BLOCK_R = max(
        1, 2048 // (BLOCK_S * BLOCK_D)
    )  # few rows of few states each would be many tiny programs
    _combine_kernel[(triton.cdiv(R, BLOCK_R),)](
        acc,
        m,
        l,
        out,
        R,
        num_splits,
        D=D,
        BLOCK_R=BLOCK_R,
        BLOCK_S=BLOCK_S,
        BLOCK_D=BLOCK_D,
        num_warps=max(1, min(8, BLOCK_R * BLOCK_S * BLOCK_D // 512)),
    )
