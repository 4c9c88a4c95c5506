"""Attention within packed sequences on Hopper.

It computes what ``flash_attention``'s plain kernel computes, in Gluon.

Who computes what is said in ``warp_specialized``. Here a warp loads the queries of one head, and
the keys and values that they see, as the descriptors of packed sequences find them.
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
    BUFFERS: int  # tiles of keys, and as many of values, in shared memory
    IN_TURN: int  # 1: the warpgroups issue their products one after the other


def launch_config(D: int) -> LaunchConfig:
    """Return the launch options for heads of ``D`` columns."""
    # in turn, one warpgroup's softmax falls into the other's products; at 128 columns products are
    # what takes longest
    return LaunchConfig(BLOCK_N=128, BUFFERS=2, IN_TURN=int(D <= 96))


@gluon.jit
def _produce(queries, q_descs, k_descs, v_descs, smem, barriers, D_REST: gl.constexpr):
    """Load the queries of this program's tiles, and the keys and values that they see.

    Each load waits until a buffer is free.
    """
    lengths, sizes, reach = queries
    B, heads, groups = sizes
    q_smem, k_smem, v_smem, _ = smem
    q_full, q_empty, k_full, v_full, freed, _ = barriers
    BUFFERS: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[3]
    round = 0  # query tiles so far
    step = 0  # tiles of keys so far
    index = gl.program_id(0)  # of a query tile, from the sequence's first on
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
            # values follow the next tile's keys: the scores are taken first
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


@gluon.jit(do_not_specialize=["B", "H", "GROUPS", "left", "right"])
def _flash_attention_kernel(
    q_desc,  # tiles (1, 1, ROWS, 1, D_MAIN) of q
    q_rest_desc,  # (1, 1, ROWS, 1, D_REST)
    k_desc,  # (1, 1, BLOCK_N, 1, D_MAIN) of k
    k_rest_desc,
    v_desc,
    v_rest_desc,
    out_desc,  # as q's
    out_rest_desc,
    cu_seqlens_ptr,  # (B + 1,)
    B,
    H,
    GROUPS,  # query heads of a key head
    left,  # keys a query sees before its own position
    right,  # and after it
    qk_scale,  # in base two
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
    # a constexpr that is given a name is one no longer, so the consumers' arguments stand here
    # twice
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
    """Return whether the kernel is for such heads.

    They need 16 bits, a head dim of the model's and rows aligned to 16 bytes.
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

    Arguments are as ``flash_attention`` has checked them; a query sees ``left`` keys before its own
    and ``right`` after.
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
        # a third of the registers for each warpgroup and the producer's, before they are divided
        # anew
        maxnreg=168,
    )
