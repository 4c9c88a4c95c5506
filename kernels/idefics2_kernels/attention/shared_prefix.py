"""Attention of decoding sequences to the pages of a prefix that several of them share.

A group is several sequences whose block tables start with the same pages. An item of work is a key
head, a part of the group's pages, and up to ``max_members`` of its sequences. Their query heads are
the rows of one matrix, so a shared key is read once for all of them. The method is that of cascade
attention and Hydragen (Juravsky et al., 2024).

``decode_attention`` has a program for each sequence and key head. A program computes one item, if
there is one for it, and then the own keys of its sequence. So there is one launch, and without
groups a program only reads that it has no item. An item stores a partial softmax state of each
member. The member's own program stores another one. The last of them to arrive merges the states,
in the order of the parts, so results do not depend on the order of arrival.
"""

import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention.split_kv import merge_states, merge_tile, store_state
from idefics2_kernels.attention.tiles import attend, empty_state, head_parts, load_head
from idefics2_kernels.gpu.target import current_arch
from idefics2_kernels.gpu.tile_counters import MAX_TILES, are_last

# Query heads of an item, which are the rows of its tile: the least that wgmma multiplies.
ITEM_ROWS = 64
# The most parts of a group's pages.
MAX_PARTS = tl.constexpr(7)
# Pages in flight.
ITEM_STAGES = 3

# The columns of ``shared_prefixes`` (B, COLUMNS). The first two are those of sequence b.
COLUMNS = tl.constexpr(6)
PAGES = tl.constexpr(0)
PARTS = tl.constexpr(1)
# The b-th of the members of all items. The members of an item are neighbors.
_MEMBER = tl.constexpr(2)
# The first member of item b, the member after its last, and its part.
_BEGIN = tl.constexpr(3)
_END = tl.constexpr(4)
_PART = tl.constexpr(5)


def max_members(groups: int) -> int:
    """Return the most members of an item, for ``groups`` query heads per key head."""
    return ITEM_ROWS // groups


def supports(q: Tensor, k_cache: Tensor, B: int) -> bool:
    """Return whether shared keys of ``B`` sequences can be read once.

    Registers would spill with wider heads, and on GPUs before Hopper. fp32 products do not use
    tensor cores.
    """
    H_KV = k_cache.shape[1]
    return (
        current_arch() >= 90
        and q.itemsize == 2
        and sum(head_parts(q.shape[2])) <= 128
        and q.shape[1] // H_KV <= ITEM_ROWS
        and B * H_KV <= MAX_TILES
    )


def item_options(D: int, num_warps: int) -> dict[str, int]:
    """Return the constants of ``attend_item`` that depend on the launch."""
    merge_m = merge_tile(MAX_PARTS.value + 1, ITEM_ROWS, D, num_warps)["MERGE_M"]
    return {
        "ITEM_M": ITEM_ROWS,
        "ITEM_STAGES": ITEM_STAGES,
        "ITEM_MERGE_M": merge_m,
        "THREADS": 32 * num_warps,
    }


@triton.jit
def _member_tokens(
    shared_prefixes_ptr,  # (B, COLUMNS)
    cu_seqlens_ptr,  # (B + 1,)
    members,  # (ROWS,), places in the list of members
    mask,  # (ROWS,)
):
    """Return the token of each member, int64."""
    sequences = tl.load(shared_prefixes_ptr + members * COLUMNS + _MEMBER, mask=mask, other=0)
    return tl.load(cu_seqlens_ptr + sequences, mask=mask, other=0).to(tl.int64)


@triton.jit
def _merge_members(
    out_ptr,  # (T, H, D), contiguous
    acc_ptr,  # (T * H, MAX_PARTS + 1, D)
    m_ptr,  # (T * H, MAX_PARTS + 1)
    l_ptr,  # (T * H, MAX_PARTS + 1)
    shared_prefixes_ptr,  # (B, COLUMNS)
    cu_seqlens_ptr,  # (B + 1,)
    begin,
    end,
    # The members of the item to merge: bit i is member begin + i.
    wanted,
    states,
    head_kv,
    H_KV,
    GROUPS,
    D: tl.constexpr,
    MERGE_S: tl.constexpr,
    MERGE_D: tl.constexpr,
    MERGE_M: tl.constexpr,
):
    """Merge the states of the ``wanted`` members' query heads of one key head."""
    for start in tl.range(0, (end - begin) * GROUPS, MERGE_M, num_stages=1):
        offs = start + tl.arange(0, MERGE_M)
        members = offs // GROUPS
        mask = (begin + members < end) & ((wanted >> members.to(tl.int64)) & 1 != 0)
        tokens = _member_tokens(shared_prefixes_ptr, cu_seqlens_ptr, begin + members, mask)
        merge_states(
            out_ptr,
            acc_ptr,
            m_ptr,
            l_ptr,
            tokens * (H_KV * GROUPS) + head_kv * GROUPS + offs % GROUPS,
            mask,
            MAX_PARTS + 1,
            states,
            D,
            MERGE_S,
            MERGE_D,
        )


@triton.jit
def attend_item(
    q_ptr,  # (T, H, D)
    k_ptr,  # (pages, P, D), of the key head
    v_ptr,  # (pages, P, D), of the key head
    out_ptr,  # (T, H, D), contiguous
    acc_ptr,  # (T * H, MAX_PARTS + 1, D)
    m_ptr,  # (T * H, MAX_PARTS + 1)
    l_ptr,  # (T * H, MAX_PARTS + 1)
    counters_ptr,  # (B * H_KV,)
    block_table_ptr,  # (B, pages of a sequence)
    cu_seqlens_ptr,  # (B + 1,)
    shared_prefixes_ptr,  # (B, COLUMNS)
    stride_table,
    q_strides,  # (token, head)
    k_strides,  # (page, slot)
    v_strides,  # (page, slot)
    item,
    head_kv,
    H_KV,
    GROUPS,
    qk_scale,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    # Tiles of a page.
    TILES: tl.constexpr,
    MERGE_S: tl.constexpr,
    MERGE_D: tl.constexpr,
    ITEM_M: tl.constexpr,
    ITEM_STAGES: tl.constexpr,
    ITEM_MERGE_M: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute item ``item`` for one key head, if there is such an item."""
    begin = tl.load(shared_prefixes_ptr + item * COLUMNS + _BEGIN)
    end = tl.load(shared_prefixes_ptr + item * COLUMNS + _END)
    if begin < end:
        part = tl.load(shared_prefixes_ptr + item * COLUMNS + _PART)
        # All members have the same pages, so the first stands for all.
        first = tl.load(shared_prefixes_ptr + begin * COLUMNS + _MEMBER)
        pages = tl.load(shared_prefixes_ptr + first * COLUMNS + PAGES)
        parts = tl.load(shared_prefixes_ptr + first * COLUMNS + PARTS)
        block_table_ptr += first.to(tl.int64) * stride_table

        # The heads of a member are neighboring rows.
        offs_m = tl.arange(0, ITEM_M)
        members = begin + offs_m // GROUPS
        mask_m = members < end
        tokens = _member_tokens(shared_prefixes_ptr, cu_seqlens_ptr, members, mask_m)
        heads = (head_kv * GROUPS + offs_m % GROUPS).to(tl.int64)
        offs_q = tokens * q_strides[0] + heads * q_strides[1]
        q = load_head(q_ptr, offs_q, mask_m, D, D_MAIN, D_REST, True)
        state = empty_state(ITEM_M, D_MAIN, D_REST)

        # Every slot of a shared page is seen by every member, so nothing is masked.
        pages_per_part = tl.cdiv(pages, parts)
        start_n = part * pages_per_part * TILES
        end_n = tl.minimum((part + 1) * pages_per_part, pages) * TILES
        offs_n = tl.arange(0, BLOCK_N)
        offs_kn, offs_vn = offs_n.to(tl.int64) * k_strides[1], offs_n.to(tl.int64) * v_strides[1]
        page = tl.load(block_table_ptr + start_n // TILES, mask=start_n < end_n, other=0)
        for tile in tl.range(start_n, end_n, num_stages=ITEM_STAGES):
            slot = tile % TILES * BLOCK_N
            k_tile = k_ptr + page.to(tl.int64) * k_strides[0] + slot * k_strides[1]
            v_tile = v_ptr + page.to(tl.int64) * v_strides[0] + slot * v_strides[1]
            page = tl.load(block_table_ptr + (tile + 1) // TILES, mask=tile + 1 < end_n, other=0)
            k = load_head(k_tile, offs_kn, mask_m, D, D_MAIN, D_REST, False)
            v = load_head(v_tile, offs_vn, mask_m, D, D_MAIN, D_REST, False)
            state = attend(state, q, k, v, mask_m, qk_scale, D_REST, False)

        store_state(
            out_ptr,
            acc_ptr,
            m_ptr,
            l_ptr,
            tokens * (H_KV * GROUPS) + heads,
            mask_m,
            part,
            MAX_PARTS + 1,
            state,
            D,
            D_MAIN,
            D_REST,
            True,
        )
        offs = begin + tl.arange(0, THREADS)
        sequences = tl.load(shared_prefixes_ptr + offs * COLUMNS + _MEMBER, mask=offs < end)
        last = are_last(counters_ptr, sequences * H_KV + head_kv, offs < end, parts + 1)
        if last != 0:
            _merge_members(
                out_ptr,
                acc_ptr,
                m_ptr,
                l_ptr,
                shared_prefixes_ptr,
                cu_seqlens_ptr,
                begin,
                end,
                last,
                parts + 1,
                head_kv,
                H_KV,
                GROUPS,
                D,
                MERGE_S,
                MERGE_D,
                ITEM_MERGE_M,
            )
