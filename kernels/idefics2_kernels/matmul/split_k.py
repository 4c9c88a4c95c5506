"""Splitting of K among programs, and the sum of their partial results.

The last program of a tile to arrive (``gpu.tile_counters``) adds the partial results of all. For
the NF4 kernels a second kernel adds them, because the sum would cost registers, and fewer programs
would run at once.

The splits are added in order, and their number depends only on the sizes. Results therefore do not
depend on which program ends first. They do not depend on the other rows either, as long as one tile
holds all rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.primitives import cast
from idefics2_kernels.gpu.tile_counters import get_counters, is_last

# Blocks of K that a split has at least. Fewer would not fill a pipeline.
MIN_STEPS = 4
_BLOCK = 1024
# Partial results that are loaded together, so that the latency of the L2 cache is paid once.
_IN_FLIGHT = tl.constexpr(4)


def k_per_split(tiles: int, K: int, block_k: int, programs: int) -> int:
    """Return how much of K a program sums, a multiple of ``block_k``.

    The number of programs is at most the larger of ``programs`` and ``tiles``.
    """
    steps = max(-(-K // block_k), 1)
    splits = max(min(programs // max(tiles, 1), steps // MIN_STEPS), 1)
    return -(-steps // splits) * block_k


@triton.jit
def store_product(
    acc,  # (BLOCK_N, BLOCK_M), fp32
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
    """Store a tile of the product, or this program's partial result of it.

    The last program of a tile adds the partial results. The grid is (tiles of N, splits, tiles of
    M).
    """
    # The columns become the last axis, as in memory.
    acc = tl.trans(acc)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    places = offs_m[:, None] * N + offs_n[None, :]
    if IS_SPLIT:
        split, splits = tl.program_id(1), tl.num_programs(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        # 32 bits are enough for the offsets: all partial results together are only the tiles of the
        # programs that run at once.
        size, offsets = M * N, places.to(tl.int32)
        tl.store(partials_ptr + split * size + offsets, acc, mask=mask)
        if is_last(counters_ptr, tile, splits):
            total = tl.zeros_like(acc)
            for first in tl.range(0, splits, _IN_FLIGHT, num_stages=1):
                # All parts are loaded before the first is added.
                parts = tl.tuple(())
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
    """Return buffers for the partial results of ``out`` (M, N), and ``tiles`` counters.

    One split needs neither, so both are ``None``.
    """
    if splits == 1:
        return None, None
    partials = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    return partials, get_counters(tiles, out.device)


@triton.jit(do_not_specialize=["M", "splits"])
def _sum_kernel(
    partials_ptr,  # (splits, M, N), fp32
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (M, N)
    M,
    N,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The product is divisible by what N is divisible by, so loads are as wide as for a constant.
    size = M * N
    mask = offs < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partials_ptr + offs, mask=mask, other=0.0)
        partials_ptr += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, cast(total, out_ptr.dtype.element_ty), mask=mask)


def sum_splits(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add ``partials`` (splits, M, N) fp32 in order, and ``bias`` (N,); round to ``dtype``: (M, N).

    The order of the splits is fixed, so the result is deterministic.
    """
    splits, M, N = partials.shape
    out = torch.empty((M, N), dtype=dtype, device=partials.device)
    if out.numel():
        _sum_kernel[(triton.cdiv(M * N, _BLOCK),)](
            partials,
            bias,
            out,
            M,
            N,
            splits,
            HAS_BIAS=bias is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
