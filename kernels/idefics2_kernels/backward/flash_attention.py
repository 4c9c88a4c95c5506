"""Gradient of attention within packed sequences, in three kernels.

With P the weights, which are computed again from the log-sum-exp of the forward pass, and
dS = P * (dout @ v^T - delta), where delta is the sum of dout * out over a head's columns:

    dq = scale * dS @ k    dk = scale * dS^T @ q    dv = P^T @ dout

- ``_row_statistics_kernel`` computes delta, and the log-sum-exp in base two. Both continue past the
  last token, so that tiles need no masks to read them.
- A program of ``_dk_dv_kernel`` has BLOCK_N keys of one head. It loops over the queries that see
  them, of each query head that shares the key head in turn.
- A program of ``_dq_kernel`` has BLOCK_M queries of one head. It loops over the keys that they see,
  as the forward pass does.

Scores are computed twice, seven products instead of five. In exchange every sum belongs to one
program and has a fixed order, without atomics and without memory for parts of sums.

Tiles are loaded through descriptors whose last row is a sequence's, so rows past its end are zeros
(``triton.tools.ragged_tma``). Where TMA cannot load them, masked loads do the same. Masks are
computed only for tiles that are not visible as a whole.
"""

from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

from idefics2_kernels.attention.tiles import (
    UNBOUNDED,
    LaunchConfig,
    base_two,
    can_have_descriptors,
    check_heads,
    check_lse,
    check_window,
    head_parts,
    load_head,
    scores,
    store_head,
)
from idefics2_kernels.gpu.checks import check_device, check_dtype, check_shape
from idefics2_kernels.gpu.primitives import LOG2_E, dot
from idefics2_kernels.gpu.target import alignment, current_arch

# Rows of a program of ``_row_statistics_kernel``.
STATISTICS_ROWS = 32
# Rows past the last token that have statistics, at least those of a tile.
PADDING = 128


def dk_dv_config(D: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return the tile of keys (BLOCK_N) and queries (BLOCK_M) for heads of ``D`` columns."""
    width = sum(head_parts(D))
    if itemsize == 4 or width > 128:
        return LaunchConfig(BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=1)
    if arch != 90:
        return LaunchConfig(BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2)
    # On an H200, text-causal-4k takes 2.24 ms, and 2.64 with 128 keys and 8 warps. vision-4900 takes
    # 2.64 ms, and 3.09. With three stages it takes 2.59, and Triton 3.6 spills registers.
    return LaunchConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


def dq_config(D: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return the tile of queries (BLOCK_M) and keys (BLOCK_N) for heads of ``D`` columns."""
    width = sum(head_parts(D))
    if itemsize == 4 or width > 128:
        return LaunchConfig(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=1)
    if arch != 90:
        return LaunchConfig(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2)
    # On an H200, text-causal-4k takes 1.55 ms, and 1.93 with two stages.
    if width > 96:
        return LaunchConfig(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
    # On an H200, vision-4900 takes 1.70 ms, and 2.12 with 128 queries and 8 warps.
    return LaunchConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=4)


@triton.jit(do_not_specialize=["T", "length"])
def _row_statistics_kernel(
    dout_ptr,  # (T, H, D)
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T), contiguous
    lse_two_ptr,  # (H, length), contiguous
    delta_ptr,  # (H, length), contiguous
    dout_strides,  # (token, head)
    out_strides,  # (token, head)
    T,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_t < T)[:, None] & (offs_d < D)
    dout_ptrs = dout_ptr + offs_t[:, None] * dout_strides[0] + head * dout_strides[1] + offs_d
    out_ptrs = out_ptr + offs_t[:, None] * out_strides[0] + head * out_strides[1] + offs_d
    dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + head * T + offs_t, mask=offs_t < T, other=float("inf"))
    # Rows past the last token have weights of zero.
    lse *= LOG2_E
    mask_t = offs_t < length
    tl.store(lse_two_ptr + head * length + offs_t, lse, mask=mask_t)
    tl.store(delta_ptr + head * length + offs_t, tl.sum(dout * out, axis=1), mask=mask_t)


@triton.jit
def _load_rows(
    ptr,  # (T, D) of one head, from the sequence's first row on
    desc,  # (1, 1, BLOCK, 1, D_MAIN) tiles, if HAS_DESCRIPTORS
    rest_desc,  # (1, 1, BLOCK, 1, D_REST) tiles
    place,  # The sequence's first row, its length, and the head
    start,
    stride,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    """Load both parts of rows ``start`` to ``start + BLOCK`` of a sequence, zeros past its end."""
    begin, T, head = place
    if HAS_DESCRIPTORS:
        main = load_ragged(desc, begin, T, [start, head, 0]).reshape(BLOCK, D_MAIN)
        rest = main
        if D_REST > 0:
            rest = load_ragged(rest_desc, begin, T, [start, head, D_MAIN]).reshape(BLOCK, D_REST)
        return main, rest
    else:
        rows = start + tl.arange(0, BLOCK)
        return load_head(ptr, rows.to(tl.int64) * stride, rows < T, D, D_MAIN, D_REST, True)


@triton.jit
def _accumulate(sums, weights, rows, D_REST: tl.constexpr):
    """Add ``weights`` @ ``rows`` to ``sums``, both of which are in two parts."""
    weights = weights.to(rows[0].dtype)
    rest = sums[1]
    if D_REST > 0:
        rest = dot(weights, rows[1], rest)
    return dot(weights, rows[0], sums[0]), rest


@triton.jit
def _zeros(ROWS: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    WIDTH_REST: tl.constexpr = D_REST if D_REST > 0 else 16
    return tl.zeros((ROWS, D_MAIN), tl.float32), tl.zeros((ROWS, WIDTH_REST), tl.float32)


@triton.jit(
    do_not_specialize=["length", "H_KV", "GROUPS", "tiles_n", "left", "right"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _dk_dv_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H_KV, D)
    v_ptr,  # (T, H_KV, D)
    dout_ptr,  # (T, H, D)
    lse_ptr,  # (H, length), in base two
    delta_ptr,  # (H, length)
    dk_ptr,  # (T, H_KV, D), contiguous
    dv_ptr,  # (T, H_KV, D), contiguous
    q_desc,  # (1, 1, BLOCK_M, 1, D_MAIN) tiles, if HAS_DESCRIPTORS
    q_rest_desc,  # (1, 1, BLOCK_M, 1, D_REST) tiles
    dout_desc,  # (1, 1, BLOCK_M, 1, D_MAIN) tiles
    dout_rest_desc,  # (1, 1, BLOCK_M, 1, D_REST) tiles
    cu_seqlens_ptr,  # (B + 1,)
    # All strides are multiples of ALIGN.
    q_strides,  # (token, head)
    k_strides,  # (token, head)
    v_strides,  # (token, head)
    dout_strides,  # (token, head)
    length,
    H_KV,
    # Query heads of a key head.
    GROUPS,
    # Key tiles of the longest sequence.
    tiles_n,
    # Keys that a query sees before its own position.
    left,
    # Keys that a query sees after its own position.
    right,
    # The scale of the scores, times log2(e).
    qk_scale,
    scale,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    # Programs that share queries run together. With a causal mask the longest come first.
    pid_n = pid % tiles_n
    head_kv = pid // tiles_n % H_KV
    sequence = pid // (tiles_n * H_KV)
    begin = tl.load(cu_seqlens_ptr + sequence)
    T = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    start_n = pid_n * BLOCK_N
    if start_n >= T:
        return

    stride_qt, stride_qh = q_strides[0] // ALIGN * ALIGN, q_strides[1] // ALIGN * ALIGN
    stride_kt, stride_kh = k_strides[0] // ALIGN * ALIGN, k_strides[1] // ALIGN * ALIGN
    stride_vt, stride_vh = v_strides[0] // ALIGN * ALIGN, v_strides[1] // ALIGN * ALIGN
    stride_dt, stride_dh = dout_strides[0] // ALIGN * ALIGN, dout_strides[1] // ALIGN * ALIGN
    k_ptr += begin.to(tl.int64) * stride_kt + head_kv.to(tl.int64) * stride_kh
    v_ptr += begin.to(tl.int64) * stride_vt + head_kv.to(tl.int64) * stride_vh
    q_ptr += begin.to(tl.int64) * stride_qt
    dout_ptr += begin.to(tl.int64) * stride_dt

    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < T
    # Tiles that stay are not loaded through descriptors: the compiler would keep them in registers.
    k = load_head(k_ptr, offs_n.to(tl.int64) * stride_kt, mask_n, D, D_MAIN, D_REST, True)
    v = load_head(v_ptr, offs_n.to(tl.int64) * stride_vt, mask_n, D, D_MAIN, D_REST, True)
    dk, dv = _zeros(BLOCK_N, D_MAIN, D_REST), _zeros(BLOCK_N, D_MAIN, D_REST)

    # The queries that see a key of the tile are in [first_m, end_m).
    last_n = tl.minimum(start_n + BLOCK_N, T) - 1
    first_m = tl.maximum(start_n - right, 0) // BLOCK_M * BLOCK_M
    tiles_m = tl.cdiv(tl.minimum(last_n + left + 1, T) - first_m, BLOCK_M)
    for i in tl.range(0, GROUPS * tiles_m):
        head = head_kv * GROUPS + i // tiles_m
        start_m = first_m + i % tiles_m * BLOCK_M
        place = begin, T, head
        q = _load_rows(
            q_ptr + head.to(tl.int64) * stride_qh, q_desc, q_rest_desc, place, start_m, stride_qt,
            BLOCK_M, D, D_MAIN, D_REST, HAS_DESCRIPTORS,
        )  # fmt: skip
        row = head.to(tl.int64) * length + begin
        offs_m = start_m + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + row + offs_m)
        p = tl.exp2(scores(k, q, D_REST) * qk_scale - lse[None, :])
        last_m = start_m + BLOCK_M - 1
        if (start_m < last_n - right) | (last_m > start_n + left) | (last_m >= T):
            distance = offs_n[:, None] - offs_m[None, :]
            visible = (distance >= -left) & (distance <= right) & (offs_m < T)[None, :]
            p = tl.where(visible, p, 0.0)
        dout = _load_rows(
            dout_ptr + head.to(tl.int64) * stride_dh, dout_desc, dout_rest_desc, place, start_m,
            stride_dt, BLOCK_M, D, D_MAIN, D_REST, HAS_DESCRIPTORS,
        )  # fmt: skip
        dv = _accumulate(dv, p, dout, D_REST)
        delta = tl.load(delta_ptr + row + offs_m)
        ds = p * (scores(v, dout, D_REST) - delta[None, :])
        dk = _accumulate(dk, ds, q, D_REST)

    # Keys past the end of the sequence have sums that are not stored.
    rows = ((begin + offs_n).to(tl.int64) * H_KV + head_kv) * D
    dk = dk[0] * scale, dk[1] * scale
    store_head(dk_ptr, rows, mask_n, dk, D, D_MAIN, D_REST)
    store_head(dv_ptr, rows, mask_n, dv, D, D_MAIN, D_REST)


@triton.jit(
    do_not_specialize=["length", "H_KV", "GROUPS", "tiles_m", "left", "right"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _dq_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H_KV, D)
    v_ptr,  # (T, H_KV, D)
    dout_ptr,  # (T, H, D)
    lse_ptr,  # (H, length), in base two
    delta_ptr,  # (H, length)
    dq_ptr,  # (T, H, D), contiguous
    k_desc,  # (1, 1, BLOCK_N, 1, D_MAIN) tiles, if HAS_DESCRIPTORS
    k_rest_desc,  # (1, 1, BLOCK_N, 1, D_REST) tiles
    v_desc,  # (1, 1, BLOCK_N, 1, D_MAIN) tiles
    v_rest_desc,  # (1, 1, BLOCK_N, 1, D_REST) tiles
    cu_seqlens_ptr,  # (B + 1,)
    # All strides are multiples of ALIGN.
    q_strides,  # (token, head)
    k_strides,  # (token, head)
    v_strides,  # (token, head)
    dout_strides,  # (token, head)
    length,
    H_KV,
    # Query heads of a key head.
    GROUPS,
    # Query tiles of the longest sequence.
    tiles_m,
    # Keys that a query sees before its own position.
    left,
    # Keys that a query sees after its own position.
    right,
    # The scale of the scores, times log2(e).
    qk_scale,
    scale,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    # The longest tiles come first.
    pid_m = tiles_m - 1 - pid // GROUPS % tiles_m
    head_kv = pid // (GROUPS * tiles_m) % H_KV
    head = head_kv * GROUPS + pid % GROUPS
    sequence = pid // (GROUPS * tiles_m * H_KV)
    begin = tl.load(cu_seqlens_ptr + sequence)
    T = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    start_m = pid_m * BLOCK_M
    if start_m >= T:
        return

    stride_qt, stride_qh = q_strides[0] // ALIGN * ALIGN, q_strides[1] // ALIGN * ALIGN
    stride_kt, stride_kh = k_strides[0] // ALIGN * ALIGN, k_strides[1] // ALIGN * ALIGN
    stride_vt, stride_vh = v_strides[0] // ALIGN * ALIGN, v_strides[1] // ALIGN * ALIGN
    stride_dt, stride_dh = dout_strides[0] // ALIGN * ALIGN, dout_strides[1] // ALIGN * ALIGN
    q_ptr += begin.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    dout_ptr += begin.to(tl.int64) * stride_dt + head.to(tl.int64) * stride_dh
    k_ptr += begin.to(tl.int64) * stride_kt + head_kv.to(tl.int64) * stride_kh
    v_ptr += begin.to(tl.int64) * stride_vt + head_kv.to(tl.int64) * stride_vh

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    # Tiles that stay are not loaded through descriptors: the compiler would keep them in registers.
    q = load_head(q_ptr, offs_m.to(tl.int64) * stride_qt, mask_m, D, D_MAIN, D_REST, True)
    dout = load_head(dout_ptr, offs_m.to(tl.int64) * stride_dt, mask_m, D, D_MAIN, D_REST, True)
    row = head.to(tl.int64) * length + begin
    lse = tl.load(lse_ptr + row + offs_m)
    delta = tl.load(delta_ptr + row + offs_m)
    dq = _zeros(BLOCK_M, D_MAIN, D_REST)

    # The keys that a query of the tile sees are in [first_n, end_n).
    last_m = tl.minimum(start_m + BLOCK_M, T) - 1
    first_n = tl.maximum(start_m - left, 0) // BLOCK_N * BLOCK_N
    end_n = tl.minimum(last_m + right + 1, T)
    place = begin, T, head_kv
    for start_n in tl.range(first_n, end_n, BLOCK_N):
        k = _load_rows(
            k_ptr, k_desc, k_rest_desc, place, start_n, stride_kt,
            BLOCK_N, D, D_MAIN, D_REST, HAS_DESCRIPTORS,
        )  # fmt: skip
        v = _load_rows(
            v_ptr, v_desc, v_rest_desc, place, start_n, stride_vt,
            BLOCK_N, D, D_MAIN, D_REST, HAS_DESCRIPTORS,
        )  # fmt: skip
        p = tl.exp2(scores(q, k, D_REST) * qk_scale - lse[:, None])
        last_n = start_n + BLOCK_N - 1
        if (start_n < last_m - left) | (last_n > start_m + right) | (last_n >= T):
            keys = start_n + tl.arange(0, BLOCK_N)[None, :]
            distance = keys - offs_m[:, None]
            p = tl.where((distance >= -left) & (distance <= right) & (keys < T), p, 0.0)
        ds = p * (scores(dout, v, D_REST) - delta[:, None])
        dq = _accumulate(dq, ds, k, D_REST)

    rows = ((begin + offs_m).to(tl.int64) * (H_KV * GROUPS) + head) * D
    dq = dq[0] * scale, dq[1] * scale
    store_head(dq_ptr, rows, mask_m, dq, D, D_MAIN, D_REST)


def _ragged(x: Tensor, rows: int, *, wanted: bool) -> tuple[Any, Any]:
    """Return descriptors of tiles of ``rows`` of ``x`` (T, H, D), one for each part of the head.

    If the head has only one part, both are the same. Unless ``wanted``, both are ``None``.
    """
    if not wanted:
        return None, None
    widths = head_parts(x.shape[-1])
    main, rest = (create_ragged_descriptor(x, [rows, 1, width or widths[0]]) for width in widths)
    return main, rest


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``q`` (T, H, D), ``k`` and ``v`` (T, H_KV, D) from ``dout``.

    ``out`` (T, H, D) and ``lse`` (H, T) are the results of ``flash_attention`` with the same
    arguments. The last axes must be contiguous, and ``lse`` as a whole. Other strides are free.

    Raises:
        ValueError: A shape, stride, device, ``window`` or ``scale`` does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, they differ, ``lse`` is not fp32 or
            ``cu_seqlens`` is not int32.
    """
    check_shape("q", q, (None, None, None))
    T, H, D = q.shape
    check_shape("k", k, (T, None, D))
    H_KV = k.shape[1]
    check_shape("v", v, (T, H_KV, D))
    check_shape("dout", dout, (T, H, D))
    check_shape("out", out, (T, H, D))
    check_heads(q, H_KV, k=k, v=v, dout=dout, out=out)
    check_lse(lse, q)
    check_shape("cu_seqlens", cu_seqlens, (None,))
    check_dtype("cu_seqlens", cu_seqlens, torch.int32)
    check_window(window)
    qk_scale = base_two(scale, D)
    check_device(q=q, k=k, v=v, dout=dout, out=out, lse=lse, cu_seqlens=cu_seqlens)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    B = cu_seqlens.shape[0] - 1
    if not q.numel() or B < 1:
        return dq, dk, dv
    length = T + PADDING
    lse_two, delta = torch.empty((2, H, length), dtype=torch.float32, device=q.device)
    D_MAIN, D_REST = head_parts(D)
    _row_statistics_kernel[(triton.cdiv(length, STATISTICS_ROWS), H)](
        dout,
        out,
        lse,
        lse_two,
        delta,
        dout.stride()[:2],
        out.stride()[:2],
        T,
        length,
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        ROWS=STATISTICS_ROWS,
        num_warps=4,
    )
    arch, align = current_arch(), alignment(q, k, v, dout)
    wanted = can_have_descriptors(q.itemsize, align, arch)
    left = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    masks = (left, 0 if causal else left, qk_scale, qk_scale / LOG2_E.value)
    strides = tuple(x.stride()[:2] for x in (q, k, v, dout))
    for kernel, outs, heads, config in (
        (_dk_dv_kernel, (dk, dv), H_KV, dk_dv_config(D, q.itemsize, arch)),
        (_dq_kernel, (dq,), H, dq_config(D, q.itemsize, arch)),
    ):
        # A program keeps a tile of keys or queries, and loops over tiles of the other.
        kept, streamed, rows = config.BLOCK_N, (q, dout), config.BLOCK_M
        if kernel is _dq_kernel:
            kept, streamed, rows = config.BLOCK_M, (k, v), config.BLOCK_N
        tiles = triton.cdiv(max_seqlen, kept)
        kernel[(tiles * heads * B,)](
            q,
            k,
            v,
            dout,
            lse_two,
            delta,
            *outs,
            *_ragged(streamed[0], rows, wanted=wanted),
            *_ragged(streamed[1], rows, wanted=wanted),
            cu_seqlens,
            *strides,
            length,
            H_KV,
            H // H_KV,
            tiles,
            *masks,
            D=D,
            D_MAIN=D_MAIN,
            D_REST=D_REST,
            ALIGN=align,
            HAS_DESCRIPTORS=wanted,
            **asdict(config),
        )
    return dq, dk, dv
