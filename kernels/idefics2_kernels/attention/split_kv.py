"""Softmax over keys that several programs share: partial softmax states and their merge.

If there are few rows with many keys, ``num_splits`` programs share the keys of a row. Each stores a
partial softmax state. The states are merged in a fixed order, so results do not depend on which
program ends first. For the few rows of a decoding sequence the last program to arrive merges them
(``share_state``). For tiles of more rows a second launch is faster than one merging program
(``combine``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention.tiles import normalize, store_head
from idefics2_kernels.gpu.dependent_launch import dependent_options, gdc_launch_dependents, gdc_wait
from idefics2_kernels.gpu.primitives import LOWEST
from idefics2_kernels.gpu.tile_counters import is_last

# All states of a row are merged at once, which limits their number.
MAX_SPLITS = 32
# Rows that are merged at once, and numbers per warp. Fewer would pay the latency of the L2 cache
# more often, and more would spill.
_MERGED_ROWS = 16
_MERGED = 144 * 32
# Rows of a program of the second launch, one per warp.
_COMBINE_ROWS = 4


@triton.jit
def store_state(
    out_ptr,  # (R, D), if not IS_SPLIT
    acc_ptr,  # (R, num_splits, D) fp32, if IS_SPLIT
    m_ptr,  # (R, num_splits) fp32, if IS_SPLIT
    l_ptr,  # (R, num_splits) fp32, if IS_SPLIT
    rows,  # (ROWS,) int64, indices into R
    mask,  # (ROWS,)
    split,
    num_splits,
    state,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Store the output of ``rows``, or their partial state if IS_SPLIT."""
    if IS_SPLIT:
        acc, acc_rest, m_i, l_i = state
        places = rows * num_splits + split
        tl.store(m_ptr + places, m_i, mask=mask)
        tl.store(l_ptr + places, l_i, mask=mask)
        store_head(acc_ptr, places * D, mask, (acc, acc_rest), D, D_MAIN, D_REST)
    else:
        store_head(
            out_ptr, rows * D, mask, normalize(state, out_ptr.dtype.element_ty), D, D_MAIN, D_REST
        )


@triton.jit
def share_state(
    out_ptr,  # (R, D)
    acc_ptr,  # (R, num_splits, D) fp32, if IS_SPLIT
    m_ptr,  # (R, num_splits) fp32, if IS_SPLIT
    l_ptr,  # (R, num_splits) fp32, if IS_SPLIT
    counters_ptr,  # (tiles,), if IS_SPLIT
    tile,
    # The tile's first row, int64, as an index into R.
    first_row,
    num_rows,
    split,
    num_splits,
    # The number of splits that have keys. Only those may call this function.
    parts,
    state,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_S: tl.constexpr,
    MERGE_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store the state of a tile of rows. The last split to arrive merges the states of all."""
    offs_m = tl.arange(0, BLOCK_M)
    store_state(
        out_ptr,
        acc_ptr,
        m_ptr,
        l_ptr,
        first_row + offs_m,
        offs_m < num_rows,
        split,
        num_splits,
        state,
        D,
        D_MAIN,
        D_REST,
        IS_SPLIT,
    )
    if IS_SPLIT:  # noqa: SIM102
        if is_last(counters_ptr, tile, parts):
            for start in tl.range(0, num_rows, MERGE_M, num_stages=1):
                offs = start + tl.arange(0, MERGE_M)
                merge_states(
                    out_ptr,
                    acc_ptr,
                    m_ptr,
                    l_ptr,
                    first_row + offs,
                    offs < num_rows,
                    num_splits,
                    parts,
                    D,
                    MERGE_S,
                    MERGE_D,
                )


@triton.jit
def merge_states(
    out_ptr,  # (R, D)
    acc_ptr,  # (R, num_splits, D)
    m_ptr,  # (R, num_splits)
    l_ptr,  # (R, num_splits)
    rows,  # (BLOCK_M,) int64, indices into R
    mask_m,  # (BLOCK_M,)
    num_splits,
    parts,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the first ``parts`` states of ``rows`` and store the output."""
    # Each split has its own variable. Some releases of the compiler would distribute an axis of
    # splits over threads, others over registers.
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    ms, ls, accs = tl.tuple(()), tl.tuple(()), tl.tuple(())
    for split in tl.static_range(BLOCK_S):
        places, is_there = rows * num_splits + split, split < parts
        ms += (tl.load(m_ptr + places, mask=mask_m & is_there, other=LOWEST, cache_modifier=".cg"),)
        ls += (tl.load(l_ptr + places, mask=mask_m & is_there, other=0.0, cache_modifier=".cg"),)
        ptrs = acc_ptr + places[:, None] * D + offs_d[None, :]
        accs += (tl.load(ptrs, mask=mask & is_there, other=0.0, cache_modifier=".cg"),)
    m_i = ms[0]
    for split in tl.static_range(1, BLOCK_S):
        m_i = tl.maximum(m_i, ms[split])
    l_i, total = tl.zeros_like(m_i), tl.zeros_like(accs[0])
    for split in tl.static_range(BLOCK_S):
        weight = tl.exp2(ms[split] - m_i)
        l_i += ls[split] * weight
        total += accs[split] * weight[:, None]
    out = tl.div_rn(total, tl.where(l_i == 0.0, 1.0, l_i)[:, None])
    tl.store(
        out_ptr + rows[:, None] * D + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
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
    IS_DEPENDENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    gdc_launch_dependents(IS_DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    gdc_wait(IS_DEPENDENT)
    merge_states(
        out_ptr,
        acc_ptr,
        m_ptr,
        l_ptr,
        rows,
        rows < R,
        num_splits,
        num_splits,
        D,
        BLOCK_S,
        BLOCK_D,
    )


def state_buffers(
    out: Tensor, num_splits: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate the partial states (acc, m, l) of ``num_splits`` programs for the rows of ``out``.

    ``out`` is (..., D). One split needs no buffers, so all three are ``None``.
    """
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
    """Merge ``acc`` (R, num_splits, D), ``m`` and ``l`` (R, num_splits) into ``out`` (R, D)."""
    R, num_splits, D = acc.shape
    _combine_kernel[(triton.cdiv(R, _COMBINE_ROWS),)](
        acc,
        m,
        l,
        out,
        R,
        num_splits,
        D=D,
        BLOCK_R=_COMBINE_ROWS,
        BLOCK_S=triton.next_power_of_2(num_splits),
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=4,
        **dependent_options(),
    )


def merge_tile(num_splits: int, rows: int, D: int, num_warps: int) -> dict[str, int]:
    """Return how many of a tile's ``rows``, splits and columns ``share_state`` merges at once.

    All three are powers of two. All splits and columns are merged at once.
    """
    MERGE_S, MERGE_D = triton.next_power_of_2(num_splits), triton.next_power_of_2(D)
    # A row needs space for its states and for their sum.
    fitting = max(_MERGED * num_warps // ((MERGE_S + 1) * MERGE_D), 1)
    MERGE_M = min(1 << fitting.bit_length() - 1, _MERGED_ROWS, triton.next_power_of_2(rows))
    return {"MERGE_M": MERGE_M, "MERGE_S": MERGE_S, "MERGE_D": MERGE_D}
