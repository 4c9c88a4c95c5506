"""Attention within packed sequences on Hopper, in Gluon.

It computes the same as the plain kernel of ``flash_attention``. ``warp_specialized`` describes how
the warps of a program share the work. The loading warp of this kernel loads the queries of one
head, and the keys and values that they see, through descriptors of packed sequences.
"""

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
    HEAD_DIMS,
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
    positions,
    query_tile,
    shared_tiles,
)
from idefics2_kernels.gpu.target import alignment, num_sms


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options."""

    BLOCK_N: int
    # Tiles of keys in shared memory, and as many tiles of values.
    BUFFERS: int
    # 1 if the warpgroups take turns in issuing their products, else 0.
    IN_TURN: int


def launch_config(D: int) -> LaunchConfig:
    """Return the launch options for heads of ``D`` columns."""
    # If the warpgroups take turns, one computes its softmax during the other's products. At 128
    # columns the products are the bottleneck, and turns do not help.
    return LaunchConfig(BLOCK_N=128, BUFFERS=2, IN_TURN=int(D <= 96))


@gluon.jit
def _produce(queries, q_descs, k_descs, v_descs, smem, barriers, D_REST: gl.constexpr):
    """Load the queries of this program's tiles, and the keys and values that they see.

    Each load waits until its buffer is free.
    """
    lengths, sizes, reach = queries
    B, heads, groups = sizes
    q_smem, k_smem, v_smem, _ = smem
    q_full, q_empty, k_full, v_full, freed, _ = barriers
    BUFFERS: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[3]
    # Query tiles that are finished.
    round = 0
    # Tiles of keys that are finished.
    step = 0
    # The index of a query tile within its sequence.
    index = gl.program_id(0)
    sequence = 0
    while sequence < B:
        begin, T, _keys, tiles_m = locate_sequence(sequence, lengths, 1)
        count = tiles_m * heads
        if index < count:
            start_m, head, head_kv = query_tile(index, tiles_m, groups, 1)
            index += gl.num_programs(0)
            for c in gl.static_range(CONSUMERS):
                place = begin, T, start_m + c * ROWS, head
                mbarrier.wait(q_empty.index(c), round & 1 ^ 1)
                load_rows(q_descs, place, q_smem, q_full, c, D_REST)
            first_m, last_m = positions(start_m, T, T, 1)
            begins, counts = key_tiles(first_m, last_m, T, reach, BLOCK_N)
            tiles = counts[0] + counts[1] + counts[2]
            before_n = 0
            # Values are loaded after the keys of the next tile, which are needed earlier.
            for tile in range(tiles + 1):
                mbarrier.wait(freed.index(step % BUFFERS), step // BUFFERS & 1 ^ 1)
                start_n = first_key(tile, begins, counts, BLOCK_N)
                if tile < tiles:
                    place = begin, T, start_n, head_kv
                    load_rows(k_descs, place, k_smem, k_full, step % BUFFERS, D_REST)
                if tile > 0:
                    place = begin, T, before_n, head_kv
                    load_rows(v_descs, place, v_smem, v_full, (step - 1) % BUFFERS, D_REST)
                before_n = start_n
                step += 1
            step -= 1
            round += 1
        else:
            index -= count
            sequence += 1


@gluon.jit(
    do_not_specialize=["B", "H", "GROUPS", "left", "right"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _flash_attention_kernel(
    q_desc,  # (1, 1, ROWS, 1, D_MAIN) tiles
    q_rest_desc,  # (1, 1, ROWS, 1, D_REST) tiles
    k_desc,  # (1, 1, BLOCK_N, 1, D_MAIN) tiles
    k_rest_desc,  # (1, 1, BLOCK_N, 1, D_REST) tiles
    v_desc,  # (1, 1, BLOCK_N, 1, D_MAIN) tiles
    v_rest_desc,  # (1, 1, BLOCK_N, 1, D_REST) tiles
    out_desc,  # (1, 1, ROWS, 1, D_MAIN) tiles
    out_rest_desc,  # (1, 1, ROWS, 1, D_REST) tiles
    cu_seqlens_ptr,  # (B + 1,)
    B,
    H,
    # Query heads of a key head.
    GROUPS,
    # Keys that a query sees before its own position.
    left,
    # Keys that a query sees after its own position.
    right,
    # The scale of the scores, times log2(e).
    qk_scale,
    D_REST: gl.constexpr,
    BUFFERS: gl.constexpr,
    IN_TURN: gl.constexpr,
):
    q_descs, k_descs, v_descs = (q_desc, q_rest_desc), (k_desc, k_rest_desc), (v_desc, v_rest_desc)
    out_descs = out_desc, out_rest_desc
    smem = (
        shared_tiles(q_descs, CONSUMERS, D_REST),
        shared_tiles(k_descs, BUFFERS, D_REST),
        shared_tiles(v_descs, BUFFERS, D_REST),
        shared_tiles(out_descs, CONSUMERS, D_REST),
    )
    barriers = all_barriers(BUFFERS)
    fence_async_shared()
    queries = (cu_seqlens_ptr, None), (B, H, GROUPS), (left, right)
    # The consumers' arguments are repeated, because a constexpr that is assigned to a variable is
    # no longer one.
    gl.warp_specialize(
        [
            (consume, (queries, out_descs, smem, barriers, None, qk_scale, D_REST, 0, IN_TURN)),
            (consume, (queries, out_descs, smem, barriers, None, qk_scale, D_REST, 1, IN_TURN)),
            (_produce, (queries, q_descs, k_descs, v_descs, smem, barriers, D_REST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernel supports these heads.

    It needs 16-bit numbers, a head dim in ``HEAD_DIMS`` and rows aligned to 16 bytes.
    """
    return q.itemsize == 2 and q.shape[-1] in HEAD_DIMS and alignment(q, k, v) > 1


def flash_attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
    left: int,
    right: int,
    qk_scale: float,
) -> None:
    """Write ``flash_attention`` of supported heads to ``out`` (T, H, D), contiguous.

    ``flash_attention`` has checked the arguments. A query sees ``left`` keys before its own and
    ``right`` keys after it.
    """
    _, H, D = q.shape
    H_KV = k.shape[1]
    config = launch_config(D)
    B = cu_seqlens.shape[0] - 1
    most_tiles = triton.cdiv(max_seqlen, TILE_ROWS) * H * B
    _flash_attention_kernel[(min(most_tiles, num_sms(q.device)),)](
        *descriptors(q, WARPGROUP_ROWS),
        *descriptors(k, config.BLOCK_N),
        *descriptors(v, config.BLOCK_N),
        *descriptors(out, WARPGROUP_ROWS),
        cu_seqlens,
        B,
        H,
        H // H_KV,
        left,
        right,
        qk_scale,
        D_REST=head_parts(D)[1],
        BUFFERS=config.BUFFERS,
        IN_TURN=config.IN_TURN,
        num_warps=4,
        # At launch the two warpgroups and the producer have a third of the registers each.
        # ``warp_specialize`` then redistributes them.
        maxnreg=168,
    )
