"""Causal attention of one new query per sequence to its keys in pages of the KV cache.

The rows of a program are the query heads of one key head. ``num_splits`` programs share the pages
of a sequence. Their number depends only on tensor sizes, so one CUDA graph works for all context
lengths. Each program computes its share of the pages from ``context_lens``. The id of the next page
is loaded one iteration ahead, as in ``paged_attention``.

If prefixes are shared, the pages in front of a sequence's own are computed as in ``shared_prefix``.
"""

from dataclasses import asdict

import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention.shared_prefix import (
    COLUMNS,
    MAX_PARTS,
    PAGES,
    PARTS,
    attend_item,
    item_options,
    supports,
)
from idefics2_kernels.attention.split_kv import (
    MAX_SPLITS,
    merge_tile,
    share_state,
    state_buffers,
)
from idefics2_kernels.attention.tiles import (
    LaunchConfig,
    attend,
    empty_state,
    head_parts,
    load_head,
)
from idefics2_kernels.gpu.dependent_launch import (
    count_lines,
    dependent_options,
    gdc_launch_dependents,
    gdc_wait,
    prefetch_lines,
)
from idefics2_kernels.gpu.target import H100_SMS, alignment, current_arch
from idefics2_kernels.gpu.tile_counters import get_counters

# The most query heads of a key head, which are the rows of a program.
MAX_GROUPS = 64
# The most programs when keys are shared: one per SM.
PROGRAMS = H100_SMS


def _block_n(P: int, itemsize: int) -> int:
    return min(P, 64 if itemsize == 2 else 32)


def launch_config(
    groups: int, D: int, P: int, itemsize: int, arch: int, *, is_split: bool
) -> LaunchConfig:
    """Return the tile for ``groups`` query heads per key head and pages of ``P`` tokens."""
    # Measured on an H100 with 16 sequences of 2,048 tokens: one program per SM takes 51 us with six
    # pages in flight, and 51 to 53 us with five. Two or three programs per SM with three or four
    # pages in flight take 53 to 59 us. If keys are not shared, two programs fit on an SM, with
    # three pages in flight each.
    width = sum(head_parts(D))
    return LaunchConfig(
        BLOCK_M=max(16, triton.next_power_of_2(groups)),
        BLOCK_N=_block_n(P, itemsize),
        num_warps=4,
        num_stages=2 if width > 128 else 6 if is_split and arch == 90 else 3,
    )


def _num_splits(programs: int, tiles: int) -> int:
    """Return how many programs share the keys of a sequence, which are up to ``tiles`` tiles.

    ``programs`` is the total number of programs if keys are not shared.
    """
    return max(1, min(PROGRAMS // programs, MAX_SPLITS, tiles))


@triton.jit
def _own_tiles(T, left, split, num_splits, BLOCK_N: tl.constexpr):
    """Return the first key in reach, the start and end tile of ``split``, and the used splits.

    ``T`` is the number of keys of the sequence. Splits beyond the last value have no tiles.
    """
    first_key = tl.maximum(T - 1 - left, 0)
    first_tile = first_key // BLOCK_N
    tiles = tl.cdiv(T, BLOCK_N) - first_tile
    per_split = tl.maximum(tl.cdiv(tiles, num_splits), 1)
    parts = tl.maximum(tl.cdiv(tiles, per_split), 1)
    start = first_tile + split * per_split
    return first_key, start, tl.minimum(start + per_split, first_tile + tiles), parts


@triton.jit(
    do_not_specialize=[
        "stride_table",
        "table_width",
        "num_pages",
        "H_KV",
        "GROUPS",
        "num_splits",
        "left",
    ],
    do_not_specialize_on_alignment=[
        "counters_ptr",
        "block_table_ptr",
        "context_lens_ptr",
        "cu_seqlens_ptr",
    ],
)
def _decode_attention_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (pages, H_KV, P, D)
    v_ptr,  # (pages, H_KV, P, D)
    out_ptr,  # (T, H, D), contiguous
    acc_ptr,  # (T * H, states of a row, D), if IS_SPLIT or HAS_SHARED
    m_ptr,  # (T * H, states of a row), if IS_SPLIT or HAS_SHARED
    l_ptr,  # (T * H, states of a row), if IS_SPLIT or HAS_SHARED
    counters_ptr,  # (B * H_KV,), if IS_SPLIT or HAS_SHARED
    block_table_ptr,  # (B, pages of a sequence)
    context_lens_ptr,  # (B,)
    cu_seqlens_ptr,  # (B + 1,)
    shared_prefixes_ptr,  # (B, COLUMNS), if HAS_SHARED
    stride_table,
    table_width,
    # All strides are multiples of ALIGN.
    q_strides,  # (token, head)
    k_strides,  # (page, head, slot)
    v_strides,  # (page, head, slot)
    num_pages,
    H_KV,
    # Query heads of a key head.
    GROUPS,
    num_splits,
    # Keys that a query sees before its own position.
    left,
    # The scale of the scores, times log2(e).
    qk_scale,
    P: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    # L2 cache lines of a key, rounded up to a power of two.
    LINES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    # Whether prefixes may be shared. Then num_splits is 1.
    HAS_SHARED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    # Rows, splits and columns that are merged at once.
    MERGE_M: tl.constexpr,
    MERGE_S: tl.constexpr,
    MERGE_D: tl.constexpr,
    # The constants of attend_item.
    ITEM_M: tl.constexpr,
    ITEM_STAGES: tl.constexpr,
    ITEM_MERGE_M: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Tiles of a page.
    TILES: tl.constexpr = P // BLOCK_N
    gdc_launch_dependents(IS_DEPENDENT)
    pid = tl.program_id(0)
    split = pid % num_splits
    head_kv = pid // num_splits % H_KV
    sequence = (pid // (num_splits * H_KV)).to(tl.int64)
    # This tells the compiler that run-time strides are multiples of ALIGN, so that it can
    # vectorize loads.
    stride_qt, stride_qh = q_strides[0] // ALIGN * ALIGN, q_strides[1] // ALIGN * ALIGN
    stride_kp, stride_ks = k_strides[0] // ALIGN * ALIGN, k_strides[2] // ALIGN * ALIGN
    stride_vp, stride_vs = v_strides[0] // ALIGN * ALIGN, v_strides[2] // ALIGN * ALIGN
    k_ptr += head_kv.to(tl.int64) * (k_strides[1] // ALIGN * ALIGN)
    v_ptr += head_kv.to(tl.int64) * (v_strides[1] // ALIGN * ALIGN)
    tables_ptr = block_table_ptr
    block_table_ptr += sequence * stride_table
    offs_n = tl.arange(0, BLOCK_N)
    offs_kn, offs_vn = offs_n.to(tl.int64) * stride_ks, offs_n.to(tl.int64) * stride_vs

    if IS_SPLIT and IS_DEPENDENT:
        # Length, page and keys are dependent loads. Reading the first two here brings all of them
        # into the L2 cache before the previous kernel has ended. ".cg" bypasses the L1 cache. If a
        # value is stale, only the prefetch is wasted, because all values are read again below.
        T = tl.load(context_lens_ptr + sequence, cache_modifier=".cg")
        _, start, end, _ = _own_tiles(T, left, split, num_splits, BLOCK_N)
        if (start >= 0) & (start < tl.minimum(end, table_width * TILES)):
            page = tl.load(block_table_ptr + start // TILES, cache_modifier=".cg")
            page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
            slot = start % TILES * BLOCK_N
            prefetch_lines(k_ptr + page * stride_kp + slot * stride_ks + offs_kn, 0, D, LINES)
            prefetch_lines(v_ptr + page * stride_vp + slot * stride_vs + offs_vn, 0, D, LINES)
    gdc_wait(IS_DEPENDENT)
    if HAS_SHARED:
        attend_item(
            q_ptr,
            k_ptr,
            v_ptr,
            out_ptr,
            acc_ptr,
            m_ptr,
            l_ptr,
            counters_ptr,
            tables_ptr,
            cu_seqlens_ptr,
            shared_prefixes_ptr,
            stride_table,
            (stride_qt, stride_qh),
            (stride_kp, stride_ks),
            (stride_vp, stride_vs),
            sequence,
            head_kv,
            H_KV,
            GROUPS,
            qk_scale,
            D,
            D_MAIN,
            D_REST,
            TILES,
            MERGE_S,
            MERGE_D,
            ITEM_M,
            ITEM_STAGES,
            ITEM_MERGE_M,
            THREADS,
            BLOCK_N,
        )
    token = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    T = tl.load(context_lens_ptr + sequence)
    if tl.load(cu_seqlens_ptr + sequence + 1) == token:
        return
    first_key, start, end, parts = _own_tiles(T, left, split, num_splits, BLOCK_N)
    if split >= parts:
        return
    if HAS_SHARED:
        pages = tl.load(shared_prefixes_ptr + sequence * COLUMNS + PAGES)
        shared_parts = tl.load(shared_prefixes_ptr + sequence * COLUMNS + PARTS)
        start = tl.maximum(start, pages * TILES)

    offs_m = tl.arange(0, BLOCK_M)
    heads = (head_kv * GROUPS + offs_m).to(tl.int64)
    mask_m = offs_m < GROUPS
    offs_q = token * stride_qt + heads * stride_qh
    q = load_head(q_ptr, offs_q, mask_m, D, D_MAIN, D_REST, True)
    state = empty_state(BLOCK_M, D_MAIN, D_REST)

    page = tl.load(block_table_ptr + start // TILES, mask=start < end, other=0)
    for tile in tl.range(start, end):
        slot = tile % TILES * BLOCK_N
        k_tile = k_ptr + page.to(tl.int64) * stride_kp + slot * stride_ks
        v_tile = v_ptr + page.to(tl.int64) * stride_vp + slot * stride_vs
        page = tl.load(block_table_ptr + (tile + 1) // TILES, mask=tile + 1 < end, other=0)
        keys = tile * BLOCK_N + offs_n
        # Other slots may hold anything, including NaN.
        mask_n = (keys >= first_key) & (keys < T)
        k = load_head(k_tile, offs_kn, mask_n, D, D_MAIN, D_REST, True)
        v = load_head(v_tile, offs_vn, mask_n, D, D_MAIN, D_REST, True)
        visible = mask_n[None, :]
        state = attend(state, q, k, v, visible, qk_scale, D_REST, True)

    if HAS_SHARED:  # noqa: SIM102
        if shared_parts > 0:
            # The own keys are the last part.
            share_state(
                out_ptr,
                acc_ptr,
                m_ptr,
                l_ptr,
                counters_ptr,
                pid,
                token * (H_KV * GROUPS) + head_kv * GROUPS,
                GROUPS,
                shared_parts,
                MAX_PARTS + 1,
                shared_parts + 1,
                state,
                D,
                D_MAIN,
                D_REST,
                True,
                MERGE_M,
                MERGE_S,
                MERGE_D,
                BLOCK_M,
            )
            return
    share_state(
        out_ptr,
        acc_ptr,
        m_ptr,
        l_ptr,
        counters_ptr,
        pid // num_splits,
        token * (H_KV * GROUPS) + head_kv * GROUPS,
        GROUPS,
        split,
        num_splits,
        parts,
        state,
        D,
        D_MAIN,
        D_REST,
        IS_SPLIT,
        MERGE_M,
        MERGE_S,
        MERGE_D,
        BLOCK_M,
    )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    left: int,
    qk_scale: float,
    shared_prefixes: Tensor | None = None,
) -> None:
    """Write ``paged_attention`` of at most one query per sequence to ``out`` (T, H, D), contiguous.

    ``paged_attention`` has checked the arguments. A query sees ``left`` keys before its own.
    """
    B, H, D = context_lens.shape[0], q.shape[1], q.shape[2]
    _, H_KV, P, _ = k_cache.shape
    D_MAIN, D_REST = head_parts(D)
    BLOCK_N = _block_n(P, q.itemsize)
    tiles = min(block_table.shape[1] * (P // BLOCK_N), left // BLOCK_N + 2)
    has_shared = shared_prefixes is not None and supports(q, k_cache, B)
    num_splits = 1 if has_shared else _num_splits(B * H_KV, tiles)
    num_states = MAX_PARTS.value + 1 if has_shared else num_splits
    config = launch_config(H // H_KV, D, P, q.itemsize, current_arch(), is_split=num_splits > 1)
    acc, m, l = state_buffers(out, num_states)
    arrived = None if acc is None else get_counters(B * H_KV, q.device)
    _decode_attention_kernel[(num_splits * H_KV * B,)](
        q,
        k_cache,
        v_cache,
        out,
        acc,
        m,
        l,
        arrived,
        block_table,
        context_lens,
        cu_seqlens,
        shared_prefixes if has_shared else None,
        block_table.stride(0),
        block_table.shape[1],
        q.stride()[:2],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        k_cache.shape[0],
        H_KV,
        H // H_KV,
        num_splits,
        left,
        qk_scale,
        P=P,
        D=D,
        D_MAIN=D_MAIN,
        D_REST=D_REST,
        ALIGN=alignment(q, k_cache, v_cache),
        LINES=count_lines(D * q.itemsize),
        IS_SPLIT=num_splits > 1,
        HAS_SHARED=has_shared,
        **dependent_options(),
        **merge_tile(num_states, H // H_KV, D, config.num_warps),
        **item_options(D, config.num_warps),
        **asdict(config),
    )
