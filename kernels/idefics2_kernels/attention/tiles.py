"""What the attention kernels share: head dims in two parts, tiles of rows, the online softmax.

A head of D columns is held as a power of two and the power of two that covers the rest: 72 as 64 +
16, 96 as 64 + 32. Tensor cores then multiply hardly more columns than there are, where padding 72
to 128 would waste two fifths of them. The softmax is online (Milakov and Gimelshein, 2018), in fp32
and in base two.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from idefics2_kernels.gpu.checks import FLOATS, check_dtype, check_rows
from idefics2_kernels.gpu.primitives import LOWEST, dot

MAX_HEAD_DIM = 256
UNBOUNDED = 2**30  # keys a query sees to one side; added to a position it stays within int32


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options; with pages, BLOCK_N keys are a page or a part of it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def head_parts(D: int) -> tuple[int, int]:
    """Return the two widths that hold ``D`` columns; the second is 0 where the first is enough."""
    main = max(16, 1 << (D.bit_length() - 1))
    return main, 0 if main >= D else max(16, triton.next_power_of_2(D - main))


def can_have_descriptors(itemsize: int, align: int, arch: int) -> bool:
    """Return whether TMA can load tiles of rows.

    The rows are aligned to ``align`` elements of ``itemsize`` bytes.
    """
    return align > 1 and itemsize == 2 and arch >= 90


def descriptors(
    x: Tensor, *block: int, wanted: bool
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """Describe tiles of ``x`` (..., D), one for each part of the head.

    ``block`` is their size on the axes before the last.

    D is an axis of its own, so that columns past a head's end read as zeros and not as the next
    head. A head that is all in one part gets the same twice. Unless ``wanted``, there are none.
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


def check_window(window: int | None) -> None:
    """Raise ``ValueError`` unless ``window`` is ``None`` or lets a query see itself."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def base_two(scale: float | None, D: int) -> float:
    """Return the factor of scores whose softmax is to be taken in base two.

    ``scale`` is 1/sqrt(D) unless given.

    Raises:
        ValueError: ``scale`` is not positive: a row's largest product must give its largest score.
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
    mask,  # (ROWS,), if MASKED: rows outside it are zeros, as columns past D are
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load both parts of rows (ROWS, D) of one head.

    Where there is one part, the second is the first.
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
    """Return the softmax state of rows that saw no key: acc in two parts, m_i, l_i."""
    acc = tl.zeros((ROWS, D_MAIN), tl.float32)
    acc_rest = tl.zeros((ROWS, D_REST if D_REST > 0 else 16), tl.float32)
    # largest score so far, in base two; finite: a row that sees no key never makes inf - inf
    m_i = tl.full((ROWS,), LOWEST, tl.float32)
    l_i = tl.zeros((ROWS,), tl.float32)
    return acc, acc_rest, m_i, l_i


@triton.jit
def _scores(
    q,  # (ROWS, D_MAIN), (ROWS, D_REST)
    k,  # (KEYS, D_MAIN), (KEYS, D_REST)
    D_REST: tl.constexpr,
):
    """Multiply queries by keys.

    In fp32 the sum is fp64, as an error in a score is one in all of its key's weight.
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
    state,  # acc in two parts, m_i, l_i
    q,  # (ROWS, D_MAIN), (ROWS, D_REST)
    k,  # (KEYS, D_MAIN), (KEYS, D_REST)
    v,  # (KEYS, D_MAIN), (KEYS, D_REST)
    visible,  # (ROWS, KEYS), if MASKED
    qk_scale,
    D_REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take a tile of keys and values into the softmax state and return that."""
    acc, acc_rest, m_i, l_i = state
    qk = _scores(q, k, D_REST)
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
    """Return the output of rows in two parts.

    Rows that saw no key have zeros, and must not divide.
    """
    acc, acc_rest, _, l_i = state
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    # the plain operator may be off by two units in the last place
    inverse = tl.div_rn(1.0, l_i) if dtype == tl.float32 else 1.0 / l_i
    return acc * inverse[:, None], acc_rest * inverse[:, None]
