"""Shared by the attention kernels in Gluon for Hopper: the computing warpgroups and barriers.

A program has one warp that loads and two warpgroups that compute. Each kernel has its own loading
code. Each warpgroup computes 64 query rows over the same keys. While a warpgroup computes the
softmax of one tile of scores, the tensor cores multiply the previous tile's weights by its values,
and work for the other warpgroup.

A program computes several query tiles. While the output of one tile is written, the queries and
keys of the next are loaded. The tiles of a program either follow from its number, or the program
takes the next tile from a global counter whenever it is free. In the second case the loading warp
passes the tile's index to the warpgroups through shared memory.

The rows of a query tile are queries of one head, or of ``PACK`` heads that share their keys. Tiles
of keys at the edges (window, diagonal, end of the sequence) come first and are masked. Tiles that
every query sees completely follow without masks. Nothing past a sequence's end is read or written,
because the descriptors end there.
"""

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from idefics2_kernels.attention.tiles import head_parts
from idefics2_kernels.gpu.gluon_compat import async_load, async_store
from idefics2_kernels.gpu.primitives import LOWEST

HEAD_DIMS = (72, 96, 128)
WARPGROUP_ROWS = 64
TILE_ROWS = 2 * WARPGROUP_ROWS
ROWS = gl.constexpr(WARPGROUP_ROWS)
# Warpgroups that compute.
CONSUMERS = gl.constexpr(2)
# Registers of a thread.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(32)
# The row at which every sequence ends, in the coordinates of its descriptor.
LAST = 2**30
END = gl.constexpr(LAST)
# The most rows that a descriptor can address.
MOST_ROWS = 2**31 - 2**16
NO_SCORE = gl.constexpr(LOWEST.value)


@gluon.jit
def locate_sequence(index, lengths, PACK: gl.constexpr):
    """Return the start of a sequence, and the numbers of its queries, keys and query tiles.

    A query tile has the queries of ``PACK`` heads.
    """
    cu_seqlens_ptr, context_lens_ptr = lengths
    begin = gl.load(cu_seqlens_ptr + index)
    S = gl.load(cu_seqlens_ptr + index + 1) - begin
    T = S
    if context_lens_ptr is not None:
        T = gl.load(context_lens_ptr + index)
    return begin, S, T, gl.cdiv(S * PACK, ROWS * CONSUMERS)


@gluon.jit
def query_tile(index, tiles_m, packs, PACK: gl.constexpr):
    """Return the first query of tile ``index`` of a sequence, its first query head and key head.

    Tiles are ordered by key head, then by length, the longest first.
    """
    pid_m = tiles_m - 1 - index // packs % tiles_m
    head_kv = index // (packs * tiles_m)
    return pid_m * (ROWS * CONSUMERS // PACK), (head_kv * packs + index % packs) * PACK, head_kv


@gluon.jit
def longest_tile(index, tiles_m, heads, packs, PACK: gl.constexpr):
    """Return the same as ``query_tile`` for tiles that programs take from a counter.

    Tiles are ordered by length, the longest of all heads first.
    """
    pid_m, pack = tiles_m - 1 - index // heads, index % heads
    return pid_m * (ROWS * CONSUMERS // PACK), pack * PACK, pack // packs


@gluon.jit
def take_tile(taken, counters_ptr, round):
    """Take the next query tile from the global counter, pass it to the warpgroups, and return it.

    ``round`` is the number of tiles that this program has had before.
    """
    slots, ready = taken
    index = gl.num_programs(0) + gl.atomic_add(counters_ptr, 1)
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slots.index(round % 2).store(gl.full([1], index, gl.int32, WARP))
    mbarrier.arrive(ready.index(round % 2))
    return index


@gluon.jit
def taken_tile(taken, round):
    """Wait until the loading warp has taken tile number ``round`` and return the tile's index.

    The first tile, number 0, is not taken from the counter.
    """
    slots, ready = taken
    mbarrier.wait(ready.index(round % 2), (round - 1) // 2 & 1)
    WARPGROUP: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(slots.index(round % 2).load(WARPGROUP), axis=0)


@gluon.jit
def positions(start_m, S, T, PACK: gl.constexpr):
    """Return the positions of a tile's first and last query.

    The queries of a sequence are at the positions of its last keys.
    """
    last_m = gl.minimum(start_m + ROWS * CONSUMERS // PACK, S) - 1
    return T - S + start_m, T - S + last_m


@gluon.jit
def key_tiles(first_m, last_m, T, reach, BLOCK_N: gl.constexpr):
    """Return the first keys and the numbers of tiles at the right edge, left edge and between.

    There is always at least one tile, even if the queries see no key.
    """
    left, right = reach
    first_n = gl.maximum(first_m - left, 0) // BLOCK_N * BLOCK_N
    end_n = gl.maximum(gl.minimum(last_m + right + 1, T), 1)
    full_n = gl.cdiv(gl.maximum(last_m - left, 0), BLOCK_N) * BLOCK_N
    edge_n = gl.maximum(gl.minimum(first_m + right + 1, T) // BLOCK_N * BLOCK_N, full_n)
    begins = edge_n, first_n, full_n
    counts = (
        gl.cdiv(end_n - edge_n, BLOCK_N),
        (full_n - first_n) // BLOCK_N,
        (edge_n - full_n) // BLOCK_N,
    )
    return begins, counts


@gluon.jit
def first_key(tile, begins, counts, BLOCK_N: gl.constexpr):
    """Return the first key of a tile of keys.

    Tiles of the right edge come first, then those of the left edge, then the others.
    """
    start_n = begins[2] - (counts[0] + counts[1]) * BLOCK_N
    if tile < counts[0] + counts[1]:
        start_n = begins[1] - counts[0] * BLOCK_N
    if tile < counts[0]:
        start_n = begins[0]
    return start_n + tile * BLOCK_N


@gluon.jit
def load_rows(descs, place, tiles, full, index, D_REST: gl.constexpr):
    """Load both parts of rows of a sequence's heads.

    The barrier ``full[index]`` completes when the data has arrived.
    """
    begin, T, row, head = place
    full = full.index(index)
    D_MAIN: gl.constexpr = tiles[0].shape[5]
    NUM_ROWS: gl.constexpr = tiles[0].shape[3] * tiles[0].shape[4]
    mbarrier.expect(full, NUM_ROWS * (D_MAIN + D_REST) * 2)
    async_load(descs[0], [END, begin + T, END - T + row, head, 0], full, tiles[0].index(index))
    if D_REST > 0:
        async_load(
            descs[1], [END, begin + T, END - T + row, head, D_MAIN], full, tiles[1].index(index)
        )


@gluon.jit
def _matrix(tiles, index):
    """Return one of several tiles (1, 1, tokens, heads, columns) as (tokens * heads, columns)."""
    return tiles.index(index).reshape([tiles.shape[3] * tiles.shape[4], tiles.shape[5]])


@gluon.jit
def _scores(q_smem, k_smem, consumer, buffer, D_REST: gl.constexpr, LAYOUT: gl.constexpr):
    """Start the product of a warpgroup's queries and a tile of keys."""
    q, k = _matrix(q_smem[0], consumer), _matrix(k_smem[0], buffer)
    BLOCK_N: gl.constexpr = k.shape[0]
    qk = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    qk = warpgroup_mma(q, k.permute((1, 0)), qk, use_acc=False, is_async=True)
    if D_REST > 0:
        q, k = _matrix(q_smem[1], consumer), _matrix(k_smem[1], buffer)
        qk = warpgroup_mma(q, k.permute((1, 0)), qk, is_async=True)
    return qk


@gluon.jit
def _softmax(qk, m_i, l_i, visible, qk_scale, MASKED: gl.constexpr):
    """Return a tile's weights, the factor for earlier sums, and the new m_i and l_i."""
    if MASKED:
        keys = gl.arange(0, qk.shape[1], gl.SliceLayout(0, qk.type.layout))[None, :]
        seen = (keys >= visible[0][:, None]) & (keys <= visible[1][:, None])
        qk = gl.where(seen, qk, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(qk, axis=1) * qk_scale)
    p = gl.exp2(qk * qk_scale - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + gl.sum(p, axis=1)


@gluon.jit
def _add_values(p, acc, acc_rest, v_smem, buffer, D_REST: gl.constexpr):
    """Start the product of weights and a tile of values, which is added to the accumulator."""
    acc = warpgroup_mma(p, _matrix(v_smem[0], buffer), acc, is_async=True)
    if D_REST > 0:
        p = gl.convert_layout(p, gl.DotOperandLayout(0, acc_rest.type.layout, 2))
        acc_rest = warpgroup_mma(p, _matrix(v_smem[1], buffer), acc_rest, is_async=True)
    return acc, acc_rest


@gluon.jit
def _wait_for_values(p, weights, acc, acc_rest, D_REST: gl.constexpr):
    """Wait for the product that ``_add_values`` started.

    The dependencies keep ``p`` in registers until then. They also force ``weights`` to be computed
    before the wait.
    """
    if D_REST > 0:
        acc, acc_rest, p, weights = warpgroup_mma_wait(0, deps=(acc, acc_rest, p, weights))
    else:
        acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))
    return acc, acc_rest, weights


@gluon.jit
def _scale_rows(acc, acc_rest, factor, D_REST: gl.constexpr):
    """Multiply the rows of both parts of the accumulator by ``factor``."""
    acc *= gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    if D_REST > 0:
        acc_rest *= gl.convert_layout(factor, gl.SliceLayout(1, acc_rest.type.layout))[:, None]
    return acc, acc_rest


@gluon.jit
def _step(
    # The accumulator in two parts, m_i, l_i, and the weights of the previous tile.
    state,
    smem,
    barriers,
    # Tiles of keys that are finished.
    step,
    # Calls that are finished.
    turns,
    # The first and last visible key of each row, if MASKED.
    visible,
    qk_scale,
    D_REST: gl.constexpr,
    CONSUMER: gl.constexpr,
    IN_TURN: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Compute a tile's scores while the previous tile's weights are multiplied by its values."""
    acc, acc_rest, m_i, l_i, p = state
    q_smem, k_smem, v_smem, _ = smem
    _, _, k_full, v_full, freed, turn = barriers
    BUFFERS: gl.constexpr = k_smem[0].shape[0]
    QK: gl.constexpr = m_i.type.layout.parent
    buffer, before = step % BUFFERS, (step - 1) % BUFFERS
    mbarrier.wait(k_full.index(buffer), step // BUFFERS & 1)
    if IN_TURN:
        mbarrier.wait(turn.index(CONSUMER), turns + (CONSUMER == 0) & 1)
    qk = _scores(q_smem, k_smem, CONSUMER, buffer, D_REST, QK)
    mbarrier.wait(v_full.index(before), (step - 1) // BUFFERS & 1)
    acc, acc_rest = _add_values(p, acc, acc_rest, v_smem, before, D_REST)
    if IN_TURN:
        mbarrier.arrive(turn.index((CONSUMER + 1) % CONSUMERS))
    qk = warpgroup_mma_wait(2 if D_REST > 0 else 1, deps=(qk,))
    weights, alpha, m_i, l_i = _softmax(qk, m_i, l_i, visible, qk_scale, MASKED)
    weights = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, acc_rest, weights = _wait_for_values(p, weights, acc, acc_rest, D_REST)
    mbarrier.arrive(freed.index(buffer))
    acc, acc_rest = _scale_rows(acc, acc_rest, alpha, D_REST)
    return acc, acc_rest, m_i, l_i, weights


@gluon.jit
def consume(
    queries,
    out_descs,
    smem,
    barriers,
    taken,
    qk_scale,
    D_REST: gl.constexpr,
    CONSUMER: gl.constexpr,
    IN_TURN: gl.constexpr,
):
    """Compute ``ROWS`` rows of each of this program's query tiles.

    The tiles are those that the loading warp has ``taken``. If that is ``None``, every n-th tile
    belongs to a program, where n is the number of programs.
    """
    lengths, sizes, reach = queries
    B, heads, packs = sizes
    q_smem, k_smem, v_smem, out_smem = smem
    q_full, q_empty, k_full, v_full, freed, _ = barriers
    BUFFERS: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[3]
    D_MAIN: gl.constexpr = k_smem[0].shape[5]
    PACK: gl.constexpr = q_smem[0].shape[4]
    dtype: gl.constexpr = out_descs[0].dtype
    WIDTH_REST: gl.constexpr = D_REST if D_REST > 0 else 16
    QK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_MAIN, 16])
    ACC_REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_REST, 16])
    offs_m = (CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, QK))) // PACK
    # Query tiles that are finished.
    round = 0
    # Tiles of keys that are finished.
    step = 0
    # The index of a query tile within its sequence.
    index = gl.program_id(0)
    # Query tiles of the earlier sequences.
    before = 0
    sequence = 0
    while sequence < B:
        begin, S, T, tiles_m = locate_sequence(sequence, lengths, PACK)
        count = tiles_m * heads
        if index < count:
            if taken is None:
                start_m, head, _head_kv = query_tile(index, tiles_m, packs, PACK)
                index += gl.num_programs(0)
            else:
                start_m, head, _head_kv = longest_tile(index, tiles_m, heads, packs, PACK)
            first_m, last_m = positions(start_m, S, T, PACK)
            begins, counts = key_tiles(first_m, last_m, T, reach, BLOCK_N)
            edges = counts[0] + counts[1]
            tiles = edges + counts[2]
            lowest = first_m + offs_m - reach[0]
            highest = gl.minimum(first_m + offs_m + reach[1], T - 1)

            mbarrier.wait(q_full.index(CONSUMER), round & 1)
            buffer = step % BUFFERS
            mbarrier.wait(k_full.index(buffer), step // BUFFERS & 1)
            qk = _scores(q_smem, k_smem, CONSUMER, buffer, D_REST, QK)
            qk = warpgroup_mma_wait(0, deps=(qk,))
            mbarrier.arrive(freed.index(buffer))
            m_i = gl.full([ROWS], NO_SCORE, gl.float32, gl.SliceLayout(1, QK))
            l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, QK))
            start_n = first_key(0, begins, counts, BLOCK_N)
            visible = lowest - start_n, highest - start_n
            # The first tile is always masked, even where every query sees it completely. A second
            # variant of this code would cost more than the mask.
            weights, _alpha, m_i, l_i = _softmax(qk, m_i, l_i, visible, qk_scale, True)
            acc = gl.zeros([ROWS, D_MAIN], gl.float32, ACC)
            acc_rest = gl.zeros([ROWS, WIDTH_REST], gl.float32, ACC_REST)
            p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, ACC, 2))
            state = acc, acc_rest, m_i, l_i, p
            for tile in range(1, edges):
                start_n = first_key(tile, begins, counts, BLOCK_N)
                state = _step(
                    state,
                    smem,
                    barriers,
                    step + tile,
                    step + tile - round - 1,
                    (lowest - start_n, highest - start_n),
                    qk_scale,
                    D_REST,
                    CONSUMER,
                    IN_TURN,
                    True,
                )
            for tile in range(gl.maximum(edges, 1), tiles):
                state = _step(
                    state,
                    smem,
                    barriers,
                    step + tile,
                    step + tile - round - 1,
                    visible,
                    qk_scale,
                    D_REST,
                    CONSUMER,
                    IN_TURN,
                    False,
                )
            acc, acc_rest, m_i, l_i, p = state
            mbarrier.arrive(q_empty.index(CONSUMER))
            step += tiles
            round += 1
            buffer = (step - 1) % BUFFERS
            mbarrier.wait(v_full.index(buffer), (step - 1) // BUFFERS & 1)
            acc, acc_rest = _add_values(p, acc, acc_rest, v_smem, buffer, D_REST)
            inverse = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
            acc, acc_rest, p = _wait_for_values(p, p, acc, acc_rest, D_REST)

            acc, acc_rest = _scale_rows(acc, acc_rest, inverse, D_REST)
            row = END - S + start_m + CONSUMER * ROWS // PACK
            # The previous output tile must have left shared memory.
            tma.store_wait(0)
            _matrix(out_smem[0], CONSUMER).store(acc.to(dtype))
            if D_REST > 0:
                _matrix(out_smem[1], CONSUMER).store(acc_rest.to(dtype))
            fence_async_shared()
            async_store(out_descs[0], [END, begin + S, row, head, 0], out_smem[0].index(CONSUMER))
            if D_REST > 0:
                async_store(
                    out_descs[1], [END, begin + S, row, head, D_MAIN], out_smem[1].index(CONSUMER)
                )
            if taken is not None:
                index = taken_tile(taken, round) - before
        else:
            index -= count
            before += count
            sequence += 1
    tma.store_wait(0)


@gluon.jit
def shared_tiles(descs, NUM: gl.constexpr, D_REST: gl.constexpr):
    """Return shared memory for both parts of ``NUM`` tiles.

    If the head has only one part, the second result is the first.
    """
    desc = descs[0]
    main = gl.allocate_shared_memory(desc.dtype, [NUM] + desc.block_type.shape, desc.layout)  # noqa: RUF005
    rest = main
    if D_REST > 0:
        desc_rest = descs[1]
        rest = gl.allocate_shared_memory(
            desc_rest.dtype,
            [NUM] + desc_rest.block_type.shape,  # noqa: RUF005
            desc_rest.layout,
        )
    return main, rest


@gluon.jit
def _barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """Return ``NUM`` barriers that complete with ``COUNT`` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def all_barriers(BUFFERS: gl.constexpr):
    """Return the barriers q_full, q_empty, k_full, v_full, freed and turn.

    A tile is loaded when its ``full`` barrier completes, and its buffer is free when ``empty``
    completes. ``freed`` covers a tile of keys and the previous tile of values. ``turn`` says which
    warpgroup may issue its products.
    """
    return (
        _barriers(CONSUMERS, 1),
        _barriers(CONSUMERS, 1),
        _barriers(BUFFERS, 1),
        _barriers(BUFFERS, 1),
        _barriers(BUFFERS, CONSUMERS),
        _barriers(CONSUMERS, 1),
    )


def descriptors(
    x: Tensor, rows: int, heads: int = 1, *, axes: tuple[int, int] = (0, 1), widest: int = 128
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return descriptors of boxes of ``rows`` x ``heads`` of ``x`` (..., D), one per head part.

    ``axes`` are the axes of rows and heads. A box has at most ``widest`` columns. ``load_rows``
    reads the boxes.

    Columns past D and rows past a sequence's end are outside the bounds of an axis, so TMA reads
    them as zeros. The coordinates of a row are (END, end of its sequence, END - length of the
    sequence + index of the row). The third axis ends at END, so a row past the sequence's end is
    out of bounds. The END rows too many in this coordinate are subtracted by the first one: END
    strides of the first axis are 2^64 elements minus END rows, and addresses wrap around. The same
    method is used in triton.tools.ragged_tma.
    """
    row, head = (x.stride(axis) for axis in axes)
    shape = [MOST_ROWS, MOST_ROWS, LAST, x.shape[axes[1]], x.shape[-1]]
    strides = [2**34 - row, row, row, head, 1]
    boxes = _boxes(x.shape[-1], rows, heads, widest)
    main, rest = (TensorDescriptor(x, shape, strides, box, layout) for box, layout in boxes)
    return main, rest


# Cached because each layer needs many of them.
@cache
def _boxes(
    D: int, rows: int, heads: int, widest: int
) -> tuple[tuple[list[int], gl.NVMMASharedLayout], ...]:
    """Return the box of each part of the head, and its layout in shared memory."""
    widths = head_parts(D)
    return tuple(
        (
            [1, 1, rows, heads, min(width or widths[0], widest)],
            gl.NVMMASharedLayout(
                swizzle_byte_width=min(128, 2 * (width or widths[0])), element_bitwidth=16, rank=5
            ),
        )
        for width in widths
    )
