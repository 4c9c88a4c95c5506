"""Attention of latents to their image's patches and to themselves.

The keys of patches and latents are two tensors that are not concatenated. The rows of one matrix
are all latents of all query heads of a key head, so keys are read once for them. There are few
images with many keys each, so ``num_splits`` programs share the keys of BLOCK_M rows. A split
computes its full tiles of patches without masks, then its part of the last patches and of the
latents.
"""

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention.split_kv import combine, state_buffers, store_state
from idefics2_kernels.attention.tiles import (
    LaunchConfig,
    attend,
    base_two,
    can_have_descriptors,
    check_heads,
    descriptors,
    empty_state,
    head_parts,
    load_head,
)
from idefics2_kernels.gpu.checks import check_device, check_dtype, check_shape
from idefics2_kernels.gpu.dependent_launch import (
    count_lines,
    dependent_options,
    gdc_launch_dependents,
    gdc_wait,
    prefetch_lines,
)
from idefics2_kernels.gpu.target import H100_SMS, alignment, current_arch

PROGRAMS = 2 * H100_SMS
# On an H100 one image takes 15.3 us with 8 splits. With 16 it takes 16.4 us, because there is more
# state to merge.
MAX_SPLITS = 8


def launch_config(D: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return the tile for heads of ``D`` columns of ``itemsize`` bytes."""
    width = sum(head_parts(D))
    # fp32 products do not use tensor cores. Larger tiles would spill hundreds of registers.
    if itemsize == 4:
        if width > 128:
            return LaunchConfig(BLOCK_M=64, BLOCK_N=16, num_warps=8, num_stages=1)
        return LaunchConfig(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    if width > 128:
        return LaunchConfig(BLOCK_M=64, BLOCK_N=32 if arch < 90 else 64, num_warps=4, num_stages=2)
    if arch == 90 and width <= 96:
        # On an H100 this is as fast as 128 rows for many images, and 1.2 times as fast for one.
        # With 4 warps 128 rows would spill.
        return LaunchConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
    # With 4 warps this tile would spill.
    return LaunchConfig(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)


def _num_splits(programs: int, tiles: int) -> int:
    """Return how many programs share ``tiles`` tiles of keys.

    ``programs`` is the total number of programs if keys are not shared.
    """
    return max(1, min(PROGRAMS // programs, MAX_SPLITS, tiles))


@triton.jit
def _own_tiles(T, L, split, num_splits, BLOCK_N: tl.constexpr):
    """Return the first and end tile of ``split``, the full patch tiles, and all patch tiles.

    The tiles of an image are those of its ``T`` patches, of which the last may be partial, and then
    those of its ``L`` latents.
    """
    whole_tiles, patch_tiles = T // BLOCK_N, tl.cdiv(T, BLOCK_N)
    tiles = patch_tiles + tl.cdiv(L, BLOCK_N)
    per_split = tl.cdiv(tiles, num_splits)
    first_tile = split * per_split
    return first_tile, tl.minimum(first_tile + per_split, tiles), whole_tiles, patch_tiles


@triton.jit(
    do_not_specialize=["P", "L", "H_KV", "GROUPS", "num_splits"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _perceiver_attention_kernel(
    q_ptr,  # (N, L, H, D)
    k_ptr,  # (P, H_KV, D)
    v_ptr,  # (P, H_KV, D)
    k_latents_ptr,  # (N, L, H_KV, D)
    v_latents_ptr,  # (N, L, H_KV, D)
    out_ptr,  # (N, L, H, D), contiguous
    acc_ptr,  # (N * L * H, num_splits, D), if IS_SPLIT
    m_ptr,  # (N * L * H, num_splits), if IS_SPLIT
    l_ptr,  # (N * L * H, num_splits), if IS_SPLIT
    k_desc,  # (BLOCK_N, 1, D_MAIN) tiles, if HAS_DESCRIPTORS
    k_rest_desc,  # (BLOCK_N, 1, D_REST) tiles
    v_desc,  # (BLOCK_N, 1, D_MAIN) tiles
    v_rest_desc,  # (BLOCK_N, 1, D_REST) tiles
    cu_seqlens_ptr,  # (N + 1,)
    # All strides are multiples of ALIGN.
    q_strides,  # (image, latent, head)
    k_strides,  # (patch, head)
    v_strides,  # (patch, head)
    k_latents_strides,  # (image, latent, head)
    v_latents_strides,  # (image, latent, head)
    P,
    L,
    H_KV,
    # Query heads of a key head.
    GROUPS,
    num_splits,
    # The scale of the scores, times log2(e).
    qk_scale,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    # L2 cache lines of a key, rounded up to a power of two.
    LINES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    gdc_launch_dependents(IS_DEPENDENT)
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(L * GROUPS, BLOCK_M)
    pid_m = pid % tiles_m
    split = pid // tiles_m % num_splits
    head_kv = pid // (tiles_m * num_splits) % H_KV
    image = (pid // (tiles_m * num_splits * H_KV)).to(tl.int64)
    # This tells the compiler that run-time strides are multiples of ALIGN, so that it can
    # vectorize loads.
    stride_qn, stride_ql = q_strides[0] // ALIGN * ALIGN, q_strides[1] // ALIGN * ALIGN
    stride_qh = q_strides[2] // ALIGN * ALIGN
    stride_kt, stride_kh = k_strides[0] // ALIGN * ALIGN, k_strides[1] // ALIGN * ALIGN
    stride_vt, stride_vh = v_strides[0] // ALIGN * ALIGN, v_strides[1] // ALIGN * ALIGN
    k_ptr += head_kv.to(tl.int64) * stride_kh
    v_ptr += head_kv.to(tl.int64) * stride_vh

    # The heads of a latent are neighboring rows.
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    latents, heads = offs_m // GROUPS, head_kv * GROUPS + offs_m % GROUPS
    mask_m = latents < L
    offs_q = image * stride_qn + latents.to(tl.int64) * stride_ql + heads.to(tl.int64) * stride_qh

    if IS_SPLIT and IS_DEPENDENT and P > 0:
        # Prefetch the first keys into the L2 cache. The offsets may be stale here. As in
        # ``decode_attention``, only the prefetch depends on them.
        begin = tl.load(cu_seqlens_ptr + image, cache_modifier=".cg")
        T = tl.load(cu_seqlens_ptr + image + 1, cache_modifier=".cg") - begin
        first_tile, _, _, _ = _own_tiles(T, L, split, num_splits, BLOCK_N)
        keys = begin + first_tile * BLOCK_N + tl.arange(0, 2 * BLOCK_N)
        keys = tl.minimum(tl.maximum(keys, 0), P - 1).to(tl.int64)
        prefetch_lines(k_ptr + keys * stride_kt, 0, D, LINES)
        prefetch_lines(v_ptr + keys * stride_vt, 0, D, LINES)
    gdc_wait(IS_DEPENDENT)
    begin = tl.load(cu_seqlens_ptr + image)
    T = tl.load(cu_seqlens_ptr + image + 1) - begin
    k_ptr += begin.to(tl.int64) * stride_kt
    v_ptr += begin.to(tl.int64) * stride_vt

    q = load_head(q_ptr, offs_q, mask_m, D, D_MAIN, D_REST, True)
    state = empty_state(BLOCK_M, D_MAIN, D_REST)

    first_tile, end_tile, whole_tiles, patch_tiles = _own_tiles(T, L, split, num_splits, BLOCK_N)
    offs_n = tl.arange(0, BLOCK_N)
    offs_kn, offs_vn = offs_n.to(tl.int64) * stride_kt, offs_n.to(tl.int64) * stride_vt
    for tile in tl.range(first_tile, tl.minimum(end_tile, whole_tiles)):
        start_n = tile * BLOCK_N
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

    # These values are computed after the loop above, because they would occupy its registers.
    stride_kl, stride_vl = (
        k_latents_strides[1] // ALIGN * ALIGN,
        v_latents_strides[1] // ALIGN * ALIGN,
    )
    k_latents_ptr += image * (k_latents_strides[0] // ALIGN * ALIGN)
    v_latents_ptr += image * (v_latents_strides[0] // ALIGN * ALIGN)
    k_latents_ptr += head_kv.to(tl.int64) * (k_latents_strides[2] // ALIGN * ALIGN)
    v_latents_ptr += head_kv.to(tl.int64) * (v_latents_strides[2] // ALIGN * ALIGN)
    # This loop has too few tiles for pipelining, which would need even more registers.
    for tile in tl.range(tl.maximum(first_tile, whole_tiles), end_tile, num_stages=1):
        is_patches = tile < patch_tiles
        keys = tl.where(is_patches, tile, tile - patch_tiles) * BLOCK_N + offs_n
        mask_n = keys < tl.where(is_patches, T, L)
        keys = keys.to(tl.int64)
        k = load_head(
            tl.where(is_patches, k_ptr, k_latents_ptr),
            keys * tl.where(is_patches, stride_kt, stride_kl),
            mask_n,
            D,
            D_MAIN,
            D_REST,
            True,
        )
        v = load_head(
            tl.where(is_patches, v_ptr, v_latents_ptr),
            keys * tl.where(is_patches, stride_vt, stride_vl),
            mask_n,
            D,
            D_MAIN,
            D_REST,
            True,
        )
        visible = mask_n[None, :]
        state = attend(state, q, k, v, visible, qk_scale, D_REST, True)

    out_rows = (image * L + latents) * (H_KV * GROUPS) + heads
    store_state(
        out_ptr,
        acc_ptr,
        m_ptr,
        l_ptr,
        out_rows,
        mask_m,
        split,
        num_splits,
        state,
        D,
        D_MAIN,
        D_REST,
        IS_SPLIT,
    )


def perceiver_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend the latents ``q`` (N, L, H, D) to their image's patches and to themselves.

    ``k_context`` and ``v_context`` are (P, H_KV, D), packed by ``cu_seqlens`` (N + 1,) int32.
    ``k_latents`` and ``v_latents`` are (N, L, H_KV, D). The result is (N, L, H, D). There is no
    mask: every latent sees all patches and latents of its image. ``max_seqlen`` is at least the
    number of patches of the largest image. It only affects how keys are divided among programs.
    Scores are multiplied by ``scale``, 1 / sqrt(D) by default. D is at most 256. The last axes must
    be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride, device or ``scale`` does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, they differ, or ``cu_seqlens`` is not int32.
    """
    check_shape("q", q, (None, None, None, None))
    N, L, H, D = q.shape
    check_shape("k_context", k_context, (None, None, D))
    P, H_KV, _ = k_context.shape
    check_shape("v_context", v_context, (P, H_KV, D))
    check_shape("k_latents", k_latents, (N, L, H_KV, D))
    check_shape("v_latents", v_latents, (N, L, H_KV, D))
    check_heads(
        q,
        H_KV,
        k_context=k_context,
        v_context=v_context,
        k_latents=k_latents,
        v_latents=v_latents,
    )
    check_shape("cu_seqlens", cu_seqlens, (N + 1,))
    check_dtype("cu_seqlens", cu_seqlens, torch.int32)
    qk_scale = base_two(scale, D)
    check_device(
        q=q,
        k_context=k_context,
        v_context=v_context,
        k_latents=k_latents,
        v_latents=v_latents,
        cu_seqlens=cu_seqlens,
    )
    out = torch.empty((N, L, H, D), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    config = launch_config(D, q.itemsize, current_arch())
    ALIGN = alignment(q, k_context, v_context, k_latents, v_latents)
    has_descriptors = can_have_descriptors(q.itemsize, ALIGN, current_arch())
    D_MAIN, D_REST = head_parts(D)
    programs = triton.cdiv(L * (H // H_KV), config.BLOCK_M) * N * H_KV
    tiles = triton.cdiv(max_seqlen, config.BLOCK_N) + triton.cdiv(L, config.BLOCK_N)
    num_splits = _num_splits(programs, tiles)
    acc, m, l = state_buffers(out, num_splits)
    _perceiver_attention_kernel[(programs * num_splits,)](
        q,
        k_context,
        v_context,
        k_latents,
        v_latents,
        out,
        acc,
        m,
        l,
        *descriptors(k_context, config.BLOCK_N, 1, wanted=has_descriptors),
        *descriptors(v_context, config.BLOCK_N, 1, wanted=has_descriptors),
        cu_seqlens,
        q.stride()[:3],
        k_context.stride()[:2],
        v_context.stride()[:2],
        k_latents.stride()[:3],
        v_latents.stride()[:3],
        P,
        L,
        H_KV,
        H // H_KV,
        num_splits,
        qk_scale,
        D=D,
        D_MAIN=D_MAIN,
        D_REST=D_REST,
        ALIGN=ALIGN,
        LINES=count_lines(D * q.itemsize),
        HAS_DESCRIPTORS=has_descriptors,
        IS_SPLIT=num_splits > 1,
        **dependent_options(),
        **asdict(config),
    )
    if acc is not None and m is not None and l is not None:
        combine(acc, m, l, out)
    return out
