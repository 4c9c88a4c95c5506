"""What products share that cut K among programs.

They share the number of cuts and the sum of the partial results.

The last program of a tile to arrive (``gpu.tile_counters``) adds the partial results of all; after
the kernels for NF4, whose registers that would cost programs at once, a second kernel does. The sum
runs over the splits in order, and their number follows from the sizes alone: results do not depend
on which program ends first, nor on the rows beside a row as long as one tile holds them all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.primitives import cast
from idefics2_kernels.gpu.tile_counters import get_counters, is_last

MIN_STEPS = 4  # blocks of K a split has at least, to fill a pipeline
_BLOCK = 1024
# parts that are loaded at once: one after the other, each would wait for the L2 cache
_IN_FLIGHT = tl.constexpr(4)


def k_per_split(tiles: int, K: int, block_k: int, programs: int) -> int:
    """Return how much of K a program sums, a multiple of ``block_k``.

    The programs of all ``tiles`` are at most ``programs``, or as many as the tiles.
    """
    steps = max(-(-K // block_k), 1)
    splits = max(min(programs // max(tiles, 1), steps // MIN_STEPS), 1)
    return -(-steps // splits) * block_k


@triton.jit
def store_product(
    acc,  # (BLOCK_N, BLOCK_M), fp32: what this program has of its tile
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (M, N), contiguous
    partials_ptr,  # (splits, M, N), fp32, if IS_SPLIT
    counters_ptr,  # (tiles,), if IS_SPLIT
    offs_n,  # (BLOCK_N,), int64
    offs_m,  # (BLOCK_M,), int64
    M,
    N,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Store a tile of the product, or this program's part of it.

    The last of its programs adds the parts.

    The grid is (tiles of N, splits, tiles of M).
    """
    acc = tl.trans(acc)  # columns last, as they lie in memory
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    places = offs_m[:, None] * N + offs_n[None, :]
    if IS_SPLIT:
        split, splits = tl.program_id(1), tl.num_programs(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        # 32 bits are enough: partial results are no more than the tiles of the programs that run at
        # once
        size, offsets = M * N, places.to(tl.int32)
        tl.store(partials_ptr + split * size + offsets, acc, mask=mask)
        if is_last(counters_ptr, tile, splits):
            total = tl.zeros_like(acc)
            for first in tl.range(0, splits, _IN_FLIGHT, num_stages=1):
                parts = tl.tuple(())  # all loaded before one is added
                for i in tl.static_range(_IN_FLIGHT):
                    parts += (
                        tl.load(
                            partials_ptr + (first + i) * size + offsets,
                            mask=mask & (first + i < splits),
                            other=0.0,
                            cache_modifier=".cg",
                        ),
                    )
                for i in tl.static_range(_IN_FLIGHT):
                    total += parts[i]
            _store_rounded(total, bias_ptr, out_ptr, places, mask, offs_n, N, HAS_BIAS)
    else:
        _store_rounded(acc, bias_ptr, out_ptr, places, mask, offs_n, N, HAS_BIAS)


@triton.jit
def _store_rounded(acc, bias_ptr, out_ptr, places, mask, offs_n, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def shared_buffers(out: Tensor, splits: int, tiles: int) -> tuple[Tensor | None, Tensor | None]:
    """Allocate the partial results of ``out`` (M, N) and give ``tiles`` counters.

    One split needs nothing.
    """
    if splits == 1:
        return None, None
    partials = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    return partials, get_counters(tiles, out.device)


@triton.jit
def _sum_kernel(
    partials_ptr,  # (splits, size), fp32
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (size,), rows of N
    size,
    N,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partials_ptr + offs, mask=mask, other=0.0)
        partials_ptr += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, cast(total, out_ptr.dtype.element_ty), mask=mask)


def sum_splits(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add ``partials`` (splits, M, N) fp32 in order, then ``bias`` (N,), and round to ``dtype``.

    The result is (M, N).
    """
    splits, M, N = partials.shape
    out = torch.empty((M, N), dtype=dtype, device=partials.device)
    if out.numel():
        _sum_kernel[(triton.cdiv(M * N, _BLOCK),)](
            partials,
            bias,
            out,
            M * N,
            N,
            splits,
            HAS_BIAS=bias is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
