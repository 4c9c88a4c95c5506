"""What products share that cut K among programs: how many cuts, and the sum of their partial results.

The sum runs over the splits in order, and their number follows from the sizes alone: results do not depend on which
program ends first, nor on the rows beside a row as long as one tile holds them all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.primitives import cast

MIN_STEPS = 4  # blocks of K a split has at least, to fill a pipeline
_BLOCK = 1024


def k_per_split(tiles: int, K: int, block_k: int, programs: int) -> int:
    """Return how much of K a program takes, a multiple of ``block_k``, so that ``tiles`` make up to ``programs``."""
    steps = max(-(-K // block_k), 1)
    splits = max(min(programs // max(tiles, 1), steps // MIN_STEPS), 1)
    return -(-steps // splits) * block_k


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
    """Add ``partials`` (splits, M, N) fp32 in order, then ``bias`` (N,), and round to ``dtype``: (M, N)."""
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
