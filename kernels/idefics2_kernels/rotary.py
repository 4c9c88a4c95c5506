"""Rotary positions for queries and keys, alone or with writes to the paged cache.

Each token has one program. It reads the token's row of cosines and sines once and rotates the heads
block by block. The two halves of a head are two tiles, because column d is rotated together with
column d + D/2.
"""

from dataclasses import asdict, dataclass

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
from idefics2_kernels.gpu.dependent_launch import (
    dependent_options,
    gdc_launch_dependents,
    gdc_wait,
    prefetch,
)
from idefics2_kernels.gpu.target import H100_SMS

# With at most this many programs, each has an SM of an H100, and an early read delays no other.
AT_ONCE = H100_SMS


@dataclass(frozen=True)
class LaunchConfig:
    """Heads and half columns of a tile, and the warps that share it."""

    BLOCK_H: int
    BLOCK_D: int
    num_warps: int


def launch_config(half: int) -> LaunchConfig:
    """Return the tile for heads of 2 * ``half`` columns."""
    # On an H100 the kernel reaches 88 % of a copy's bandwidth at 8192 tokens. With D = 128 a thread
    # moves 16 bytes of each half of 16 heads.
    return LaunchConfig(BLOCK_H=16, BLOCK_D=max(32, triton.next_power_of_2(half)), num_warps=4)


@triton.jit
def rotate_heads(
    x_ptr,  # (H, D)
    out_ptr,  # (H, D), contiguous columns
    stride_x,
    stride_out,
    cos,  # (1, BLOCK_D)
    sin,  # (1, BLOCK_D)
    H,
    HALF,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotate the heads of one token, block by block."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for begin in range(0, H, BLOCK_H):
        offs_h = begin + tl.arange(0, BLOCK_H)[:, None]
        mask = (offs_h < H) & (offs_d < HALF)
        ptrs = x_ptr + offs_h.to(tl.int64) * stride_x + offs_d
        first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + offs_h.to(tl.int64) * stride_out + offs_d
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptrs, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(out_ptrs + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def _copy_heads(
    x_ptr,  # (H, D)
    out_ptr,  # (H, D)
    stride_x,
    stride_out,
    H,
    D,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for begin in range(0, H, BLOCK_H):
        offs_h = begin + tl.arange(0, BLOCK_H)[:, None]
        mask = (offs_h < H) & (offs_d < D)
        x = tl.load(x_ptr + offs_h.to(tl.int64) * stride_x + offs_d, mask=mask, other=0.0)
        tl.store(out_ptr + offs_h.to(tl.int64) * stride_out + offs_d, x, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotary_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H_KV, D)
    v_ptr,  # (T, H_KV, D), if HAS_CACHE
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (positions, D): D/2 cosines, then D/2 sines
    slots_ptr,  # (T,), if HAS_CACHE
    q_out_ptr,  # (T, H, D)
    k_out_ptr,  # (T, H_KV, D), or (pages, H_KV, P, D) if HAS_CACHE
    v_out_ptr,  # (pages, H_KV, P, D), if HAS_CACHE
    q_strides,  # (token, head)
    k_strides,  # (token, head)
    v_strides,  # (token, head)
    stride_cos_sin,
    q_out_strides,  # (token, head)
    k_out_strides,  # (token, head), or (page, head, offset) if HAS_CACHE
    v_out_strides,  # (page, head, offset)
    H,
    H_KV,
    HALF,
    P,
    num_rows,
    LOOKS_AHEAD: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    gdc_launch_dependents(IS_DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    if LOOKS_AHEAD and IS_DEPENDENT:
        # Prefetch the token's row of cos_sin into the L2 cache. The position is read before the
        # previous kernel has ended and may be stale. In that case only the prefetch is wasted,
        # because the position is read again below. ".cg" keeps the stale value out of the L1 cache.
        row = tl.load(positions_ptr + token, cache_modifier=".cg").to(tl.int64)
        row = tl.minimum(tl.maximum(row, 0), num_rows - 1)
        columns = tl.minimum(tl.arange(0, BLOCK_D) * 2, 2 * HALF - 1)
        prefetch(cos_sin_ptr + row * stride_cos_sin + columns)
        if HAS_CACHE:
            prefetch(slots_ptr + token)
    gdc_wait(IS_DEPENDENT)
    mask_d = offs_d < HALF
    table = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * stride_cos_sin + offs_d
    cos = tl.load(table, mask=mask_d, other=0.0).to(tl.float32)
    sin = tl.load(table + HALF, mask=mask_d, other=0.0).to(tl.float32)

    q_row = q_ptr + token * q_strides[0]
    q_out_row = q_out_ptr + token * q_out_strides[0]
    rotate_heads(
        q_row, q_out_row, q_strides[1], q_out_strides[1], cos, sin, H, HALF, BLOCK_H, BLOCK_D
    )

    k_row = k_ptr + token * k_strides[0]
    if HAS_CACHE:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        # A negative slot is padding.
        if slot >= 0:
            page, offset = slot // P, slot % P
            k_out_row = k_out_ptr + page * k_out_strides[0] + offset * k_out_strides[2]
            rotate_heads(
                k_row,
                k_out_row,
                k_strides[1],
                k_out_strides[1],
                cos,
                sin,
                H_KV,
                HALF,
                BLOCK_H,
                BLOCK_D,
            )
            v_row = v_ptr + token * v_strides[0]
            v_out_row = v_out_ptr + page * v_out_strides[0] + offset * v_out_strides[2]
            _copy_heads(
                v_row,
                v_out_row,
                v_strides[1],
                v_out_strides[1],
                H_KV,
                2 * HALF,
                BLOCK_H,
                2 * BLOCK_D,
            )
    else:
        k_out_row = k_out_ptr + token * k_out_strides[0]
        rotate_heads(
            k_row, k_out_row, k_strides[1], k_out_strides[1], cos, sin, H_KV, HALF, BLOCK_H, BLOCK_D
        )


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``q`` (T, H, D) and ``k`` (T, H_KV, D) by their ``positions`` (T,), rounding once.

    ``cos_sin`` (positions, D) holds D/2 cosines, then D/2 sines. Column d is rotated together with
    column d + D/2. Every position must be a row of ``cos_sin``. The last axes must be contiguous.
    Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, ``q`` and ``k`` differ in dtype, or
            ``positions`` are not integers.
    """
    check_rotary(positions, cos_sin, q=q, k=k)
    check_device(q=q, k=k, positions=positions, cos_sin=cos_sin)
    q_out, k_out = (torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device) for x in (q, k))
    _launch(q, k, None, positions, cos_sin, None, q_out, k_out, None)
    return q_out, k_out


def rotary_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate ``q`` and ``k``, write ``k`` and ``v`` into the cache, and return ``q``.

    The rotation is that of ``rotary``. ``k`` and ``v`` are (T, H_KV, D). ``k_cache`` and
    ``v_cache`` (pages, H_KV, P, D) are written in place at ``slots`` (T,) = page * P + offset. A
    negative slot is padding: nothing is written for it. All other slots must be inside the cache
    and distinct. The last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, queries, keys, values and caches differ in
            dtype, or ``positions`` or ``slots`` are not integers.
    """
    check_rotary(positions, cos_sin, q=q, k=k)
    T, H_KV, D = k.shape
    check_shape("v", v, (T, H_KV, D))
    check_shape("k_cache", k_cache, (None, H_KV, None, D))
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    check_shape("slots", slots, (T,))
    check_dtype("slots", slots, *INTS)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, tensor, q.dtype)
        check_rows(name, tensor)
    check_device(
        q=q,
        k=k,
        v=v,
        positions=positions,
        cos_sin=cos_sin,
        k_cache=k_cache,
        v_cache=v_cache,
        slots=slots,
    )
    q_out = torch.empty(tuple(q.shape), dtype=q.dtype, device=q.device)
    _launch(q, k, v, positions, cos_sin, slots, q_out, k_cache, v_cache)
    return q_out


def check_rotary(positions: Tensor, cos_sin: Tensor, **heads: Tensor) -> None:
    """Check the arguments of a rotation of ``heads``, (T, number of heads, D) each.

    Raises:
        ValueError: A shape or stride does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, heads differ in dtype, or ``positions`` are
            not integers.
    """
    (first, x), *others = heads.items()
    check_shape(first, x, (None, None, None))
    T, _, D = x.shape
    if D % 2:
        raise ValueError(f"{first} must have an even last axis, got {tuple(x.shape)}")
    for name, other in others:
        check_shape(name, other, (T, None, D))
    check_shape("positions", positions, (T,))
    check_shape("cos_sin", cos_sin, (None, D))
    check_dtype(first, x, *FLOATS)
    for name, other in others:
        check_dtype(name, other, x.dtype)
    check_dtype("positions", positions, *INTS)
    check_dtype("cos_sin", cos_sin, *FLOATS)
    for name, tensor in (*heads.items(), ("cos_sin", cos_sin)):
        check_rows(name, tensor)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
) -> None:
    T, H, D = q.shape
    if T == 0:
        return
    config = launch_config(D // 2)
    _rotary_kernel[(T,)](
        q,
        k,
        v,
        positions.contiguous(),
        cos_sin,
        None if slots is None else slots.contiguous(),
        q_out,
        k_out,
        v_out,
        q.stride()[:2],
        k.stride()[:2],
        (0, 0) if v is None else v.stride()[:2],
        cos_sin.stride(0),
        q_out.stride()[:2],
        k_out.stride()[:-1],
        (0, 0, 0) if v_out is None else v_out.stride()[:-1],
        H,
        k.shape[1],
        D // 2,
        1 if v_out is None else v_out.shape[2],
        cos_sin.shape[0],
        LOOKS_AHEAD=T <= AT_ONCE,
        HAS_CACHE=v_out is not None,
        **asdict(config),
        **dependent_options(),
    )
