"""Sums of the rows of a matrix, which a bias or the weight of a norm has as its gradient.

The rows are divided among a fixed number of programs, each of which sums its part in order. A
second launch of the same kernel sums the parts in order. The result depends on the number of rows
and not on the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Parts of the rows, at most.
PARTS = 128
# A tile. The last launch has few programs, so a program has few columns.
BLOCK_M = 32
BLOCK_N = 32


@triton.jit(do_not_specialize=["M", "part"])
def _column_sums_kernel(
    x_ptr,  # (M, N)
    out_ptr,  # (parts, N), contiguous
    stride_x,
    M,
    N,
    # Rows of a part.
    part,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    begin, end = pid * part, tl.minimum((pid + 1) * part, M)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(begin, end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask = (offs_m < end)[:, None] & mask_n[None, :]
        ptrs = x_ptr + offs_m[:, None] * stride_x + offs_n[None, :]
        sums += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid * N + offs_n, out, mask=mask_n)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of ``x`` (M, N), whose last axis is contiguous, in fp32: (N,) in ``dtype``."""
    M, N = x.shape
    if not M or not N:
        return torch.zeros(N, dtype=dtype, device=x.device)
    part = max(BLOCK_M, triton.cdiv(M, PARTS))
    parts = triton.cdiv(M, part)
    if parts > 1:
        x = _launch(x, part, parts, torch.float32)
    return _launch(x, x.shape[0], 1, dtype)[0]


def _launch(x: Tensor, part: int, parts: int, dtype: torch.dtype) -> Tensor:
    M, N = x.shape
    out = torch.empty((parts, N), dtype=dtype, device=x.device)
    _column_sums_kernel[(triton.cdiv(N, BLOCK_N), parts)](
        x, out, x.stride(0), M, N, part, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4
    )
    return out
