"""Causal attention to keys in pages on Hopper, in Gluon.

It computes the same as the plain kernel of ``paged_attention``. ``warp_specialized`` describes how
the warps of a program share the work. The rows of a tile are queries and the heads that share their
keys, as in the plain kernel. The loading warp loads them, and tiles of keys and values of two pages
each.

The descriptors treat the cache like packed sequences. A page is a sequence that ends after its last
key, so TMA fills slots without a key with zeros, whatever they contain. In the page where the
window begins, the rows before the window have negative coordinates, and TMA fills them with zeros
too. A page can be cut at one end only. This is guaranteed because the window is at least a page.
"""

import math
from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from idefics2_kernels.attention.tiles import head_parts
from idefics2_kernels.attention.warp_specialized import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    END,
    HEAD_DIMS,
    MOST_ROWS,
    PRODUCER_REGISTERS,
    ROWS,
    TILE_ROWS,
    WARPGROUP_ROWS,
    all_barriers,
    consume,
    descriptors,
    first_key,
    key_tiles,
    load_rows,
    locate_sequence,
    longest_tile,
    positions,
    shared_tiles,
    take_tile,
)
from idefics2_kernels.gpu.gluon_compat import async_load, reinterpret
from idefics2_kernels.gpu.target import alignment, num_sms
from idefics2_kernels.gpu.tile_counters import get_counters

PAGE_SIZE = 64
PAGE = gl.constexpr(PAGE_SIZE)
# Keys of a tile.
BLOCK_N = gl.constexpr(2 * PAGE_SIZE)
# Columns of a box. A box is as wide as a swizzle, so that in shared memory the boxes of two pages
# have the layout of one box of 128 rows.
_COLUMNS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Launch options."""

    # Query heads whose rows share a tile.
    PACK: int
    # Tiles of keys in shared memory, and as many tiles of values.
    BUFFERS: int
    # 1 if the warpgroups take turns in issuing their products, else 0.
    IN_TURN: int


def launch_config(D: int, groups: int) -> LaunchConfig:
    """Return the launch options for ``groups`` query heads per key head, of ``D`` columns."""
    # A tile of packed heads has fewer positions and therefore fewer tiles of keys at the edges. The
    # other options are those of ``flash_attention_hopper``.
    return LaunchConfig(PACK=math.gcd(groups, WARPGROUP_ROWS), BUFFERS=2, IN_TURN=int(D <= 96))


@gluon.jit
def _page(key, first_n, end_n, table_ptr):
    """Return the id of the page that begins at ``key``, a row of the page and its coordinate.

    The row and its coordinate bound the rows that TMA reads. If the window begins in the page, the
    row is the first one inside the window, at coordinate 0. Otherwise it is the first row after the
    last key, at coordinate END. Neither the id nor the rows of a page outside [first_n, end_n) are
    read.
    """
    before = first_n - key
    rows = gl.minimum(end_n - key, PAGE)
    page = gl.load(table_ptr + key // PAGE, mask=(before < PAGE) & (rows > 0), other=0)
    edge = gl.where(before > 0, before, rows)
    coordinate = gl.where(before > 0, 0, END)
    return page, edge, coordinate


@gluon.jit
def _load_pages(descs, pages, page_rows, head, tiles, boxes, full, index, D_REST: gl.constexpr):
    """Load both parts of a tile's two pages of one head.

    The barrier ``full[index]`` completes when the data has arrived.
    """
    full = full.index(index)
    D_MAIN: gl.constexpr = tiles[0].shape[5]
    COLUMNS: gl.constexpr = boxes[0].shape[5]
    BLOCKS: gl.constexpr = D_MAIN // COLUMNS
    mbarrier.expect(full, BLOCK_N * (D_MAIN + D_REST) * 2)
    for i in gl.static_range(2):
        page, edge, coordinate = pages[i]
        row, place = page * page_rows + edge, coordinate - edge
        for block in gl.static_range(BLOCKS):
            async_load(
                descs[0],
                [coordinate, row, place, head, block * COLUMNS],
                full,
                boxes[0].index((index * BLOCKS + block) * 2 + i),
            )
        if D_REST > 0:
            async_load(
                descs[1],
                [coordinate, row, place, head, D_MAIN],
                full,
                boxes[1].index(index * 2 + i),
            )


@gluon.jit
def _produce(
    queries,
    table,
    q_descs,
    k_descs,
    v_descs,
    smem,
    barriers,
    taken,
    counters_ptr,
    D_REST: gl.constexpr,
):
    """Take query tiles, and load their queries and the keys and values that they see.

    Each load waits until its buffer is free.
    """
    lengths, sizes, reach = queries
    B, heads, packs = sizes
    block_table_ptr, stride_table, k_rows, v_rows = table
    q_smem, k_smem, v_smem, _ = smem
    q_full, q_empty, k_full, v_full, freed, _ = barriers
    k_boxes, v_boxes = _boxes(k_smem, k_descs, D_REST), _boxes(v_smem, v_descs, D_REST)
    BUFFERS: gl.constexpr = k_smem[0].shape[0]
    PACK: gl.constexpr = q_smem[0].shape[4]
    # Query tiles that are finished.
    round = 0
    # Tiles of keys that are finished.
    step = 0
    # The index of a query tile within its sequence.
    index = gl.program_id(0)
    # Query tiles of the earlier sequences.
    tiles_before = 0
    sequence = 0
    while sequence < B:
        begin, S, T, tiles_m = locate_sequence(sequence, lengths, PACK)
        count = tiles_m * heads
        if index < count:
            start_m, head, head_kv = longest_tile(index, tiles_m, heads, packs, PACK)
            for c in gl.static_range(CONSUMERS):
                place = begin, S, start_m + c * (ROWS // PACK), head
                mbarrier.wait(q_empty.index(c), round & 1 ^ 1)
                load_rows(q_descs, place, q_smem, q_full, c, D_REST)
            first_m, last_m = positions(start_m, S, T, PACK)
            begins, counts = key_tiles(first_m, last_m, T, reach, BLOCK_N)
            tiles = counts[0] + counts[1] + counts[2]
            first_n, end_n = first_m - reach[0], last_m + 1
            table_ptr = block_table_ptr + gl.cast(sequence, gl.int64) * stride_table
            before = (0, 0, END), (0, 0, END)
            # Values are loaded after the keys of the next tile, which are needed earlier.
            for tile in range(tiles + 1):
                start_n = first_key(tile, begins, counts, BLOCK_N)
                # The ids are loaded before the wait for a buffer, so that the latencies overlap.
                pages = (
                    _page(start_n, first_n, end_n, table_ptr),
                    _page(start_n + PAGE, first_n, end_n, table_ptr),
                )
                mbarrier.wait(freed.index(step % BUFFERS), step // BUFFERS & 1 ^ 1)
                buffer = step % BUFFERS
                if tile < tiles:
                    _load_pages(
                        k_descs, pages, k_rows, head_kv, k_smem, k_boxes, k_full, buffer, D_REST
                    )
                if tile > 0:
                    buffer = (step - 1) % BUFFERS
                    _load_pages(
                        v_descs, before, v_rows, head_kv, v_smem, v_boxes, v_full, buffer, D_REST
                    )
                before = pages
                step += 1
            step -= 1
            round += 1
            index = take_tile(taken, counters_ptr, round) - tiles_before
        else:
            index -= count
            tiles_before += count
            sequence += 1
    # The last program to finish resets the counters for the next launch.
    if gl.atomic_add(counters_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit
def _key_memory(descs, NUM: gl.constexpr, D_MAIN: gl.constexpr, D_REST: gl.constexpr):
    """Return shared memory for both parts of ``NUM`` tiles of keys.

    If the head has only one part, the second result is the first.
    """
    dtype: gl.constexpr = descs[0].dtype
    main = gl.allocate_shared_memory(dtype, [NUM, 1, 1, BLOCK_N, 1, D_MAIN], descs[0].layout)
    rest = main
    if D_REST > 0:
        rest = gl.allocate_shared_memory(dtype, [NUM, 1, 1, BLOCK_N, 1, D_REST], descs[1].layout)
    return main, rest


@gluon.jit
def _boxes(tiles, descs, D_REST: gl.constexpr):
    """Return the memory of ``tiles`` as boxes.

    The order is by tile, then by columns, then by page.
    """
    COLUMNS: gl.constexpr = descs[0].block_type.shape[4]
    NUM: gl.constexpr = tiles[0].shape[0] * tiles[0].shape[5] // COLUMNS * 2
    main = reinterpret(tiles[0], descs[0].dtype, [NUM, 1, 1, PAGE, 1, COLUMNS], descs[0].layout)
    rest = main
    if D_REST > 0:
        NUM_REST: gl.constexpr = tiles[1].shape[0] * 2
        rest = reinterpret(
            tiles[1], descs[1].dtype, [NUM_REST, 1, 1, PAGE, 1, D_REST], descs[1].layout
        )
    return main, rest


@gluon.jit(
    do_not_specialize=[
        "stride_table",
        "k_rows",
        "v_rows",
        "B",
        "heads",
        "packs",
        "left",
    ],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "context_lens_ptr",
        "cu_seqlens_ptr",
        "counters_ptr",
    ],
)
def _paged_attention_kernel(
    q_desc,  # (1, 1, ROWS // PACK, PACK, D_MAIN) tiles
    q_rest_desc,  # (1, 1, ROWS // PACK, PACK, D_REST) tiles
    k_desc,  # (1, 1, PAGE, 1, 64) boxes
    k_rest_desc,  # (1, 1, PAGE, 1, D_REST) boxes
    v_desc,  # (1, 1, PAGE, 1, 64) boxes
    v_rest_desc,  # (1, 1, PAGE, 1, D_REST) boxes
    out_desc,  # (1, 1, ROWS // PACK, PACK, D_MAIN) tiles
    out_rest_desc,  # (1, 1, ROWS // PACK, PACK, D_REST) tiles
    block_table_ptr,  # (B, pages of a sequence)
    context_lens_ptr,  # (B,)
    cu_seqlens_ptr,  # (B + 1,)
    counters_ptr,  # (2,): tiles that were taken, programs that have ended
    stride_table,
    # Rows of the cache between the starts of neighboring pages.
    k_rows,
    v_rows,
    B,
    # Packs of all key heads.
    heads,
    # Packs of PACK query heads each of one key head.
    packs,
    # Keys that a query sees before its own position.
    left,
    # The scale of the scores, times log2(e).
    qk_scale,
    D_MAIN: gl.constexpr,
    D_REST: gl.constexpr,
    BUFFERS: gl.constexpr,
    IN_TURN: gl.constexpr,
):
    q_descs, k_descs, v_descs = (q_desc, q_rest_desc), (k_desc, k_rest_desc), (v_desc, v_rest_desc)
    out_descs = out_desc, out_rest_desc
    smem = (
        shared_tiles(q_descs, CONSUMERS, D_REST),
        _key_memory(k_descs, BUFFERS, D_MAIN, D_REST),
        _key_memory(v_descs, BUFFERS, D_MAIN, D_REST),
        shared_tiles(out_descs, CONSUMERS, D_REST),
    )
    barriers = all_barriers(BUFFERS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    taken = slots, ready
    fence_async_shared()
    lengths, sizes = (cu_seqlens_ptr, context_lens_ptr), (B, heads, packs)
    queries = lengths, sizes, (left, 0)
    table = block_table_ptr, stride_table, k_rows, v_rows
    # The consumers' arguments are repeated, because a constexpr that is assigned to a variable is
    # no longer one.
    gl.warp_specialize(
        [
            (consume, (queries, out_descs, smem, barriers, taken, qk_scale, D_REST, 0, IN_TURN)),
            (consume, (queries, out_descs, smem, barriers, taken, qk_scale, D_REST, 1, IN_TURN)),
            (
                _produce,
                (
                    queries,
                    table,
                    q_descs,
                    k_descs,
                    v_descs,
                    smem,
                    barriers,
                    taken,
                    counters_ptr,
                    D_REST,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, left: int) -> bool:
    """Return whether the kernel supports this call.

    It needs 16-bit numbers, a head dim in ``HEAD_DIMS``, pages of 64 tokens, a page stride that is
    a multiple of the slot stride, rows aligned to 16 bytes, and a window of at least a page.
    """
    return (
        q.itemsize == 2
        and q.shape[-1] in HEAD_DIMS
        and k_cache.shape[2] == PAGE_SIZE
        and left >= PAGE_SIZE - 1
        and alignment(q, k_cache, v_cache) > 1
        and all(
            cache.stride(0) % cache.stride(2) == 0
            and cache.shape[0] * (cache.stride(0) // cache.stride(2)) <= MOST_ROWS
            for cache in (k_cache, v_cache)
        )
    )


def paged_attention_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
    left: int,
    qk_scale: float,
) -> None:
    """Write ``paged_attention`` of a supported call to ``out`` (T, H, D), contiguous.

    ``paged_attention`` has checked the arguments. A query sees ``left`` keys before its own.
    """
    _, H, D = q.shape
    B, H_KV = context_lens.shape[0], k_cache.shape[1]
    config = launch_config(D, H // H_KV)
    pack = config.PACK
    most_tiles = triton.cdiv(max_seqlen * pack, TILE_ROWS) * (H // pack) * B
    D_MAIN, D_REST = head_parts(D)
    _paged_attention_kernel[(min(most_tiles, num_sms(q.device)),)](
        *descriptors(q, WARPGROUP_ROWS // pack, pack),
        *descriptors(k_cache, PAGE_SIZE, axes=(2, 1), widest=_COLUMNS),
        *descriptors(v_cache, PAGE_SIZE, axes=(2, 1), widest=_COLUMNS),
        *descriptors(out, WARPGROUP_ROWS // pack, pack),
        block_table,
        context_lens,
        cu_seqlens,
        get_counters(2, q.device),
        block_table.stride(0),
        k_cache.stride(0) // k_cache.stride(2),
        v_cache.stride(0) // v_cache.stride(2),
        B,
        H // pack,
        H // H_KV // pack,
        left,
        qk_scale,
        D_MAIN=D_MAIN,
        D_REST=D_REST,
        BUFFERS=config.BUFFERS,
        IN_TURN=config.IN_TURN,
        num_warps=4,
        # At launch the two warpgroups and the producer have a third of the registers each.
        # ``warp_specialize`` then redistributes them.
        maxnreg=168,
    )
