"""Summed cross entropy of a linear head and its gradients, without the logits as a whole.

Rows without a target are left out before the product. The others are computed in chunks whose
logits have a fixed number of bytes. For each chunk cuBLAS computes the logits. A program of the
kernel then computes the loss of a row in fp32 and replaces the logits by their gradient. cuBLAS
multiplies that by the head, and, if the head trains, by the hidden states.

The kernel reads a row twice. The second time it is in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dtype,
    check_rows,
    check_shape,
)
from idefics2_kernels.gpu.primitives import LN_2, LOG2_E, LOWEST

IGNORED_TARGET = -100
# Bytes of a chunk's logits. With a vocabulary of 32,000 in 16 bits, a chunk has 640 rows.
CHUNK_BYTES = 40 << 20
# The same if the head trains. Its gradient is as large, and is added up once a chunk.
CHUNK_BYTES_WEIGHT = 256 << 20
# A chunk has a multiple of this number of rows, a tile of cuBLAS.
CHUNK_ROWS = 128
# Rows of logits are aligned to this number of elements.
ALIGN = 64
BLOCK_V = 4096


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (R, V), replaced by its gradient
    targets_ptr,  # (R,)
    losses_ptr,  # (R,) fp32
    stride_logits,
    V,
    BLOCK_V: tl.constexpr,
):
    # In fp32, errors of a row's sum or exponents would count in all its gradients.
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * stride_logits
    target_logit = tl.load(logits_ptr + target).to(WIDE)
    # Half of the lowest number, so that its product with log2(e) is finite.
    m_i = tl.full([], LOWEST / 2, WIDE)
    l_i = tl.zeros([], WIDE)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(WIDE)
        m_new = tl.maximum(m_i, tl.max(x, axis=0))
        l_i = l_i * tl.exp2((m_i - m_new) * LOG2_E) + tl.sum(tl.exp2((x - m_new) * LOG2_E), axis=0)
        m_i = m_new
    tl.store(losses_ptr + row, (tl.log2(l_i) * LN_2 - (target_logit - m_i)).to(tl.float32))
    inverse = 1.0 / l_i
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(WIDE)
        p = tl.exp2((x - m_i) * LOG2_E) * inverse
        gradient = tl.where(offs_v == target, p - 1.0, p)
        tl.store(logits_ptr + offs_v, gradient.to(dtype), mask=offs_v < V)


def chunk_rows(V: int, itemsize: int, *, weight_grad: bool) -> int:
    """Return the rows of a chunk for a vocabulary of ``V`` and logits of ``itemsize`` bytes."""
    rows = (CHUNK_BYTES_WEIGHT if weight_grad else CHUNK_BYTES) // (V * itemsize)
    return max(CHUNK_ROWS, rows // CHUNK_ROWS * CHUNK_ROWS)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weight_grad: bool,
    labeled: Tensor | None = None,
) -> tuple[Tensor, int, Tensor, Tensor | None]:
    """Return the summed cross entropy of logits, the count of targets, and the sum's gradients.

    The logits are ``hidden`` (T, K) times ``weight`` (V, K) transposed, rounded to their dtype.
    Rows whose target (T,) is -100 have no loss and a gradient of zero. Without any other row the
    loss is 0 and all gradients are zero. The gradients are those of ``hidden`` and of ``weight``,
    which is ``None`` without ``weight_grad``. ``labeled`` (R,) int64 are the rows with a target,
    ascending. If it is not given, they are found, which waits for the device.

    Raises:
        ValueError: A shape, stride or device does not fit, or, on a CPU, a target is neither -100
            nor in the vocabulary. On a GPU that is a device-side assertion.
        TypeError: A dtype is none of bf16, fp16, fp32, they differ, or indices are no integers.
    """
    check_shape("hidden", hidden, (None, None))
    T, K = hidden.shape
    check_shape("weight", weight, (None, K))
    check_shape("targets", targets, (T,))
    check_dtype("hidden", hidden, *FLOATS)
    check_dtype("weight", weight, hidden.dtype)
    check_dtype("targets", targets, *INTS)
    check_rows("hidden", hidden)
    check_rows("weight", weight)
    if labeled is not None:
        check_shape("labeled", labeled, (None,))
        check_dtype("labeled", labeled, torch.int64)
    check_device(hidden=hidden, weight=weight, targets=targets, labeled=labeled)
    V = weight.shape[0]
    _check_targets(targets, V)
    if labeled is None:
        labeled = torch.nonzero(targets != IGNORED_TARGET)[:, 0]
    R = labeled.shape[0]
    rows = min(R, chunk_rows(V, hidden.itemsize, weight_grad=weight_grad))
    losses = torch.empty(R, dtype=torch.float32, device=hidden.device)
    stride = triton.cdiv(V, ALIGN) * ALIGN
    buffer = torch.empty((rows, stride), dtype=hidden.dtype, device=hidden.device)
    dhidden = torch.zeros_like(hidden)
    dweight = None
    for first in range(0, R, max(rows, 1)):
        picked = labeled[first : first + rows]
        count = picked.shape[0]
        x, logits = hidden[picked], buffer[:count, :V]
        torch.mm(x, weight.t(), out=logits)
        _cross_entropy_kernel[(count,)](
            logits, targets[picked], losses[first:], stride, V, BLOCK_V=BLOCK_V, num_warps=8
        )
        dhidden.index_copy_(0, picked, logits @ weight)
        if weight_grad:
            product = logits.t() @ x
            if rows < R:
                # Chunks are added in fp32, in order.
                product = product.float()
            dweight = product if dweight is None else dweight.add_(product)
    if weight_grad:
        dweight = torch.zeros_like(weight) if dweight is None else dweight.to(weight.dtype)
    return losses.sum(), R, dhidden, dweight


def _check_targets(targets: Tensor, V: int) -> None:
    is_valid = (((targets >= 0) & (targets < V)) | (targets == IGNORED_TARGET)).all()
    wanted = f"targets must be {IGNORED_TARGET} or in a vocabulary of {V}"
    if targets.device.type == "cpu":
        if not is_valid:
            raise ValueError(f"{wanted}, got {targets.min()} to {targets.max()}")
    else:
        torch._assert_async(is_valid, wanted)
