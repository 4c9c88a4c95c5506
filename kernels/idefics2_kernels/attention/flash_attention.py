"""Attention within packed sequences: causal or full, with or without a window, grouped heads.

A program computes BLOCK_M queries of one head. It loops over the keys that they see. Tiles that
every query sees completely come first and need no masks. The few tiles at the edges (window,
diagonal, end of the sequence) follow. A query sees ``left`` keys before its own and ``right`` keys
after it, so causal, full and windowed attention are one kernel.

Programs are ordered by key head, then by length, the longest tiles first. Programs that share keys
therefore run together, and their keys stay in the L2 cache.
"""

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention.flash_attention_hopper import flash_attention_hopper, supports
from idefics2_kernels.attention.tiles import (
    UNBOUNDED,
    LaunchConfig,
    attend,
    base_two,
    can_have_descriptors,
    check_heads,
    check_lse,
    check_window,
    descriptors,
    empty_state,
    head_parts,
    load_head,
    log_sum_exp,
    normalize,
    store_head,
)
from idefics2_kernels.gpu.checks import check_device, check_dtype, check_shape
from idefics2_kernels.gpu.target import alignment, current_arch, is_hopper


def launch_config(D: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return the tile for heads of ``D`` columns of ``itemsize`` bytes."""
    width = sum(head_parts(D))
    # fp32 products do not use tensor cores. Larger tiles would spill hundreds of registers.
    if itemsize == 4:
        if width > 96:
            return LaunchConfig(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=1)
        return LaunchConfig(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    # These tiles need at most 96 KB of shared memory.
    if arch != 90:
        if width > 128:
            return LaunchConfig(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2)
        # Tiles of 64 keys would spill.
        return LaunchConfig(
            BLOCK_M=128, BLOCK_N=32, num_warps=4 if width <= 96 else 8, num_stages=2
        )
    if width > 128:
        return LaunchConfig(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)
    if width > 96:
        return LaunchConfig(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=3)
    # With 8 warps the kernel reaches two thirds of this speed.
    return LaunchConfig(BLOCK_M=128, BLOCK_N=64, num_warps=4, num_stages=3)


@triton.jit(
    do_not_specialize=["tokens", "H_KV", "GROUPS", "tiles_m", "left", "right"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _flash_attention_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H_KV, D)
    v_ptr,  # (T, H_KV, D)
    out_ptr,  # (T, H, D), contiguous
    lse_ptr,  # (H, T) fp32, contiguous, if HAS_LSE
    k_desc,  # (BLOCK_N, 1, D_MAIN) tiles, if HAS_DESCRIPTORS
    k_rest_desc,  # (BLOCK_N, 1, D_REST) tiles
    v_desc,  # (BLOCK_N, 1, D_MAIN) tiles
    v_rest_desc,  # (BLOCK_N, 1, D_REST) tiles
    cu_seqlens_ptr,  # (B + 1,)
    # All strides are multiples of ALIGN.
    q_strides,  # (token, head)
    k_strides,  # (token, head)
    v_strides,  # (token, head)
    # Tokens of all sequences.
    tokens,
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
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    HAS_LSE: tl.constexpr,
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

    # This tells the compiler that run-time strides are multiples of ALIGN, so that it can
    # vectorize loads.
    stride_qt, stride_qh = q_strides[0] // ALIGN * ALIGN, q_strides[1] // ALIGN * ALIGN
    stride_kt, stride_kh = k_strides[0] // ALIGN * ALIGN, k_strides[1] // ALIGN * ALIGN
    stride_vt, stride_vh = v_strides[0] // ALIGN * ALIGN, v_strides[1] // ALIGN * ALIGN
    q_ptr += begin.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    k_ptr += begin.to(tl.int64) * stride_kt + head_kv.to(tl.int64) * stride_kh
    v_ptr += begin.to(tl.int64) * stride_vt + head_kv.to(tl.int64) * stride_vh

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_kn, offs_vn = offs_n.to(tl.int64) * stride_kt, offs_n.to(tl.int64) * stride_vt
    mask_m = offs_m < T
    q = load_head(q_ptr, offs_m.to(tl.int64) * stride_qt, mask_m, D, D_MAIN, D_REST, True)
    state = empty_state(BLOCK_M, D_MAIN, D_REST)

    # Every query sees all keys in [full_n, edge_n). The edges are [first_n, full_n) and
    # [edge_n, end_n).
    last_m = tl.minimum(start_m + BLOCK_M, T) - 1
    first_n = tl.maximum(start_m - left, 0) // BLOCK_N * BLOCK_N
    end_n = tl.minimum(last_m + right + 1, T)
    full_n = tl.cdiv(tl.maximum(last_m - left, 0), BLOCK_N) * BLOCK_N
    edge_n = tl.maximum(tl.minimum(start_m + right + 1, T) // BLOCK_N * BLOCK_N, full_n)

    for start_n in tl.range(full_n, edge_n, BLOCK_N):
        if HAS_DESCRIPTORS:
            k = k_desc.load([begin + start_n, head_kv, 0]).reshape(BLOCK_N, D_MAIN)
            v = v_desc.load([begin + start_n, head_kv, 0]).reshape(BLOCK_N, D_MAIN)
            k_rest, v_rest = k, v
            if D_REST > 0:
                k_rest = k_rest_desc.load([begin + start_n, head_kv, D_MAIN])
                k_rest = k_rest.reshape(BLOCK_N, D_REST)
                v_rest = v_rest_desc.load([begin + start_n, head_kv, D_MAIN])
                v_rest = v_rest.reshape(BLOCK_N, D_REST)
            k, v = (k, k_rest), (v, v_rest)
        else:
            k_tile = k_ptr + tl.cast(start_n, tl.int64) * stride_kt
            v_tile = v_ptr + tl.cast(start_n, tl.int64) * stride_vt
            k = load_head(k_tile, offs_kn, mask_m, D, D_MAIN, D_REST, False)
            v = load_head(v_tile, offs_vn, mask_m, D, D_MAIN, D_REST, False)
        state = attend(state, q, k, v, mask_m, qk_scale, D_REST, False)

    tiles_left = (full_n - first_n) // BLOCK_N
    tiles_right = tl.cdiv(end_n - edge_n, BLOCK_N)
    # The edges have too few tiles for pipelining, which would need registers and cause spills.
    for i in tl.range(0, tiles_left + tiles_right, num_stages=1):
        skipped = tl.where(i < tiles_left, first_n, edge_n - (full_n - first_n))
        keys = skipped + i * BLOCK_N + offs_n
        mask_n = keys < T
        k = load_head(k_ptr, keys.to(tl.int64) * stride_kt, mask_n, D, D_MAIN, D_REST, True)
        v = load_head(v_ptr, keys.to(tl.int64) * stride_vt, mask_n, D, D_MAIN, D_REST, True)
        distance = keys[None, :] - offs_m[:, None]
        visible = mask_n[None, :] & (distance >= -left) & (distance <= right)
        state = attend(state, q, k, v, visible, qk_scale, D_REST, True)

    if HAS_LSE:
        lse_row = lse_ptr + head.to(tl.int64) * tokens + begin
        tl.store(lse_row + offs_m, log_sum_exp(state), mask=mask_m)
    out_rows = (begin + offs_m).to(tl.int64) * (H_KV * GROUPS) + head
    store_head(
        out_ptr,
        out_rows * D,
        mask_m,
        normalize(state, out_ptr.dtype.element_ty),
        D,
        D_MAIN,
        D_REST,
    )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    plain: bool = False,
) -> Tensor:
    """Attend within packed sequences: ``q`` (T, H, D), ``k`` and ``v`` (T, H_KV, D) -> (T, H, D).

    ``cu_seqlens`` (B + 1,) int32 holds the start of each sequence and the end of the last.
    ``max_seqlen`` is at least the length of the longest sequence. Query i sees key j of its own
    sequence if |i - j| < ``window`` and, if ``causal``, j <= i. Scores are multiplied by ``scale``,
    1 / sqrt(D) by default. D is at most 256. The last axes must be contiguous. Other strides are
    free. ``lse`` (H, T) fp32, contiguous, receives the natural logarithm of each query's sum of
    exponentials, which the gradient needs. On Hopper a faster kernel computes the shapes that
    ``flash_attention_hopper.supports``, unless ``plain`` or with ``lse``.

    Raises:
        ValueError: A shape, stride, device, ``window`` or ``scale`` does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, they differ, or ``cu_seqlens`` is not int32.
    """
    check_shape("q", q, (None, None, None))
    T, H, D = q.shape
    check_shape("k", k, (T, None, D))
    H_KV = k.shape[1]
    check_shape("v", v, (T, H_KV, D))
    check_heads(q, H_KV, k=k, v=v)
    check_shape("cu_seqlens", cu_seqlens, (None,))
    check_dtype("cu_seqlens", cu_seqlens, torch.int32)
    check_window(window)
    qk_scale = base_two(scale, D)
    if lse is not None:
        check_lse(lse, q)
    check_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, lse=lse)
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    if not out.numel() or cu_seqlens.shape[0] < 2:
        return out
    left = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    arguments = (q, k, v, cu_seqlens, max_seqlen, out, left, 0 if causal else left, qk_scale)
    if not plain and lse is None and is_hopper() and supports(q, k, v):
        flash_attention_hopper(*arguments)
    else:
        _flash_attention_plain(*arguments, lse)
    return out


def _flash_attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
    left: int,
    right: int,
    qk_scale: float,
    lse: Tensor | None,
) -> None:
    T, H, D = q.shape
    H_KV, B = k.shape[1], cu_seqlens.shape[0] - 1
    config = launch_config(D, q.itemsize, current_arch())
    ALIGN = alignment(q, k, v)
    has_descriptors = can_have_descriptors(q.itemsize, ALIGN, current_arch())
    D_MAIN, D_REST = head_parts(D)
    tiles_m = triton.cdiv(max_seqlen, config.BLOCK_M)
    _flash_attention_kernel[(tiles_m * H * B,)](
        q,
        k,
        v,
        out,
        lse,
        *descriptors(k, config.BLOCK_N, 1, wanted=has_descriptors),
        *descriptors(v, config.BLOCK_N, 1, wanted=has_descriptors),
        cu_seqlens,
        q.stride()[:2],
        k.stride()[:2],
        v.stride()[:2],
        T,
        H_KV,
        H // H_KV,
        tiles_m,
        left,
        right,
        qk_scale,
        D=D,
        D_MAIN=D_MAIN,
        D_REST=D_REST,
        ALIGN=ALIGN,
        HAS_DESCRIPTORS=has_descriptors,
        HAS_LSE=lse is not None,
        **asdict(config),
    )
