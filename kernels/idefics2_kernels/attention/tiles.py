"""Shared by the attention kernels: head dims in two parts, tiles of rows, the online softmax.

A head of D columns is held in two parts: a power of two, and the power of two that covers the rest.
For example, 72 columns are held as 64 + 16, and 96 as 64 + 32. Padding 72 columns to 128 would
waste two fifths of the tensor cores' work. The softmax is online (Milakov and Gimelshein, 2018), in
fp32 and in base two.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from idefics2_kernels.gpu.checks import FLOATS, check_dtype, check_rows, check_shape
from idefics2_kernels.gpu.primitives import LN_2, LOWEST, dot

MAX_HEAD_DIM = 256
# The number of visible keys on one side without a window. Its sum with a position fits into int32.
UNBOUNDED = 2**30


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options. With pages, BLOCK_N keys are a page or a part of one."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def head_parts(D: int) -> tuple[int, int]:
    """Return the two widths that hold ``D`` columns. The second is 0 if the first is enough."""
    main = max(16, 1 << (D.bit_length() - 1))
    return main, 0 if main >= D else max(16, triton.next_power_of_2(D - main))


def can_have_descriptors(itemsize: int, align: int, arch: int) -> bool:
    """Return whether TMA can load rows aligned to ``align`` elements of ``itemsize`` bytes."""
    return align > 1 and itemsize == 2 and arch >= 90


def descriptors(
    x: Tensor, *block: int, wanted: bool
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """Return descriptors of tiles of ``x`` (..., D), one for each part of the head.

    ``block`` is the size of a tile on the axes before the last. D is a separate axis, so columns
    past the end of a head are read as zeros and not as the next head. If the head has only one
    part, both descriptors are the same. Unless ``wanted``, both are ``None``.
    """
    if not wanted:
        return None, None
    widths = head_parts(x.shape[-1])
    main, rest = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [*block, width or widths[0]])
        for width in widths
    )
    return main, rest


def check_heads(q: Tensor, H_KV: int, **keys: Tensor) -> None:
    """Check dtypes, rows and heads of ``q`` (..., H, D), ``keys`` and values (..., H_KV, D).

    Raises:
        ValueError: D is 0 or above 256, H is no multiple of H_KV, or a last axis is not contiguous.
        TypeError: A dtype is none of bf16, fp16, fp32, or differs from ``q``'s.
    """
    H, D = q.shape[-2:]
    check_dtype("q", q, *FLOATS)
    check_rows("q", q)
    for name, tensor in keys.items():
        check_dtype(name, tensor, q.dtype)
        check_rows(name, tensor)
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head dim from 1 to {MAX_HEAD_DIM}, got {D}")
    if H_KV < 1 or H % H_KV:
        raise ValueError(f"q must have a multiple of the {H_KV} key heads, got {H} heads")


def check_lse(lse: Tensor, q: Tensor) -> None:
    """Check the log-sum-exp ``lse`` (H, T) of queries ``q`` (T, H, D).

    Raises:
        ValueError: It has another shape, or is not contiguous.
        TypeError: It is not fp32.
    """
    check_shape("lse", lse, (q.shape[1], q.shape[0]))
    check_dtype("lse", lse, torch.float32)
    if not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous, got strides {lse.stride()}")


def check_window(window: int | None) -> None:
    """Raise ``ValueError`` unless ``window`` is ``None`` or at least 1, the query's own key."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def base_two(scale: float | None, D: int) -> float:
    """Return the factor of scores for a softmax in base two: ``scale`` * log2(e).

    ``scale`` is 1 / sqrt(D) by default. It must be positive, because the kernels find a row's
    largest score by its largest product.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    scale = D**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale * math.log2(math.e)


@triton.jit
def _load_part(
    ptr,
    offsets,  # (ROWS,) int64
    mask,  # (ROWS,), if MASKED
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + offsets[:, None] + columns[None, :]
    if FIRST + WIDTH <= D:
        if MASKED:
            return tl.load(ptrs, mask=mask[:, None], other=0.0)
        else:
            return tl.load(ptrs)
    else:
        if MASKED:
            return tl.load(ptrs, mask=mask[:, None] & (columns < D)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def load_head(
    ptr,
    offsets,  # (ROWS,) int64
    mask,  # (ROWS,), if MASKED
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load both parts of rows (ROWS, D) of one head.

    Rows outside ``mask`` and columns past D are zeros. If the head has only one part, the second
    result is the first.
    """
    main = _load_part(ptr, offsets, mask, 0, D_MAIN, D, MASKED)
    rest = main
    if D_REST > 0:
        rest = _load_part(ptr, offsets, mask, D_MAIN, D_REST, D, MASKED)
    return main, rest


@triton.jit
def store_head(
    ptr,
    offsets,  # (ROWS,) int64
    mask,  # (ROWS,)
    parts,  # (ROWS, D_MAIN), (ROWS, D_REST)
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
):
    """Round and store both parts of rows (ROWS, D) of one head."""
    columns = tl.arange(0, D_MAIN)
    tl.store(
        ptr + offsets[:, None] + columns[None, :],
        parts[0].to(ptr.dtype.element_ty),
        mask=mask[:, None] & (columns < D)[None, :],
    )
    if D_REST > 0:
        columns = D_MAIN + tl.arange(0, D_REST)
        tl.store(
            ptr + offsets[:, None] + columns[None, :],
            parts[1].to(ptr.dtype.element_ty),
            mask=mask[:, None] & (columns < D)[None, :],
        )


@triton.jit
def empty_state(ROWS: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    """Return the initial softmax state of rows: acc in two parts, m_i, l_i."""
    acc = tl.zeros((ROWS, D_MAIN), tl.float32)
    acc_rest = tl.zeros((ROWS, D_REST if D_REST > 0 else 16), tl.float32)
    # The largest score so far, in base two. It is finite, so that a row that sees no key does not
    # compute inf - inf.
    m_i = tl.full((ROWS,), LOWEST, tl.float32)
    l_i = tl.zeros((ROWS,), tl.float32)
    return acc, acc_rest, m_i, l_i


@triton.jit
def scores(
    q,  # (ROWS, D_MAIN), (ROWS, D_REST)
    k,  # (KEYS, D_MAIN), (KEYS, D_REST)
    D_REST: tl.constexpr,
):
    """Multiply queries by keys: (ROWS, KEYS) fp32.

    For fp32 inputs the sum is in fp64, because an error in a score changes the whole weight of its
    key.
    """
    if q[0].dtype == tl.float32:
        qk = tl.dot(q[0].to(tl.float64), tl.trans(k[0]).to(tl.float64), out_dtype=tl.float64)
        if D_REST > 0:
            qk += tl.dot(q[1].to(tl.float64), tl.trans(k[1]).to(tl.float64), out_dtype=tl.float64)
        return qk.to(tl.float32)
    else:
        qk = dot(q[0], tl.trans(k[0]), tl.zeros((q[0].shape[0], k[0].shape[0]), tl.float32))
        if D_REST > 0:
            qk = dot(q[1], tl.trans(k[1]), qk)
        return qk


@triton.jit
def attend(
    state,  # (ROWS, D_MAIN), (ROWS, D_REST), (ROWS,), (ROWS,)
    q,  # (ROWS, D_MAIN), (ROWS, D_REST)
    k,  # (KEYS, D_MAIN), (KEYS, D_REST)
    v,  # (KEYS, D_MAIN), (KEYS, D_REST)
    visible,  # (ROWS, KEYS), if MASKED
    qk_scale,
    D_REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the softmax state after a further tile of keys and values."""
    acc, acc_rest, m_i, l_i = state
    qk = scores(q, k, D_REST)
    if MASKED:
        qk = tl.where(visible, qk, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, axis=1) * qk_scale)
    p = tl.exp2(qk * qk_scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    p = p.to(v[0].dtype)
    acc = dot(p, v[0], acc * alpha[:, None])
    if D_REST > 0:
        acc_rest = dot(p, v[1], acc_rest * alpha[:, None])
    return acc, acc_rest, m_new, l_i


@triton.jit
def normalize(state, dtype: tl.constexpr):
    """Return the output of rows in two parts. Rows that saw no key are zeros."""
    acc, acc_rest, _, l_i = state
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    # The plain operator may be off by two units in the last place, which matters in fp32.
    inverse = tl.div_rn(1.0, l_i) if dtype == tl.float32 else 1.0 / l_i
    return acc * inverse[:, None], acc_rest * inverse[:, None]


@triton.jit
def log_sum_exp(state):
    """Return the natural logarithm of the sum of exponentials of rows: -inf if they saw no key."""
    _, _, m_i, l_i = state
    is_empty = l_i == 0.0
    lse = (m_i + tl.log2(tl.where(is_empty, 1.0, l_i))) * LN_2
    return tl.where(is_empty, float("-inf"), lse)
