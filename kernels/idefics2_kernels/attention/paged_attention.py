"""Causal attention of new queries to keys in pages of the KV cache.

The rows of one matrix are all queries of all query heads of a key head, so keys are read once for
them. A program computes BLOCK_M rows. Pages that every row sees completely come first and need no
masks. The pages at the edges (window, diagonal, end of the sequence) follow. A tile of keys is a
page, or a part of a large page.

The id of the next page is loaded one iteration ahead. If it were loaded in the iteration that needs
it, the compiler would give keys and values only one buffer, regardless of ``num_stages``.

``decode_attention`` computes calls with one query per sequence.
"""

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.attention.decode_attention import MAX_GROUPS, decode_attention
from idefics2_kernels.attention.paged_attention_hopper import paged_attention_hopper, supports
from idefics2_kernels.attention.shared_prefix import COLUMNS
from idefics2_kernels.attention.tiles import (
    UNBOUNDED,
    LaunchConfig,
    attend,
    base_two,
    can_have_descriptors,
    check_heads,
    check_window,
    descriptors,
    empty_state,
    head_parts,
    load_head,
    normalize,
    store_head,
)
from idefics2_kernels.gpu.checks import check_device, check_dtype, check_rows, check_shape
from idefics2_kernels.gpu.target import alignment, current_arch, is_hopper


def launch_config(rows: int, D: int, P: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return the tile for ``rows`` of a sequence and key head, and pages of ``P`` tokens."""
    width = sum(head_parts(D))
    small = rows <= 64
    # fp32 products do not use tensor cores. Larger tiles would spill hundreds of registers.
    if itemsize == 4:
        if width > 128:
            return LaunchConfig(BLOCK_M=64, BLOCK_N=16, num_warps=8, num_stages=1)
        return LaunchConfig(BLOCK_M=32, BLOCK_N=min(P, 32), num_warps=8, num_stages=1)
    if arch != 90 and width > 128:
        return LaunchConfig(BLOCK_M=64, BLOCK_N=min(P, 32), num_warps=4, num_stages=2)
    # Tiles of 64 keys would spill.
    if arch != 90 and not small:
        return LaunchConfig(BLOCK_M=128, BLOCK_N=min(P, 32), num_warps=8, num_stages=2)
    return LaunchConfig(
        BLOCK_M=64 if small else 128,
        BLOCK_N=min(P, 64),
        num_warps=4 if small or width <= 96 else 8,
        num_stages=3 if arch == 90 and width <= 128 else 2,
    )


@triton.jit(
    do_not_specialize=["stride_table", "H_KV", "GROUPS", "tiles_m", "left"],
    do_not_specialize_on_alignment=["block_table_ptr", "context_lens_ptr", "cu_seqlens_ptr"],
)
def _paged_attention_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (pages, H_KV, P, D)
    v_ptr,  # (pages, H_KV, P, D)
    out_ptr,  # (T, H, D), contiguous
    k_desc,  # (1, 1, BLOCK_N, D_MAIN) tiles, if HAS_DESCRIPTORS
    k_rest_desc,  # (1, 1, BLOCK_N, D_REST) tiles
    v_desc,  # (1, 1, BLOCK_N, D_MAIN) tiles
    v_rest_desc,  # (1, 1, BLOCK_N, D_REST) tiles
    block_table_ptr,  # (B, pages of a sequence)
    context_lens_ptr,  # (B,)
    cu_seqlens_ptr,  # (B + 1,)
    stride_table,
    # All strides but that of the table are multiples of ALIGN.
    q_strides,  # (token, head)
    k_strides,  # (page, head, slot)
    v_strides,  # (page, head, slot)
    H_KV,
    # Query heads of a key head.
    GROUPS,
    # Row tiles of the sequence with the most queries.
    tiles_m,
    # Keys that a query sees before its own position.
    left,
    # The scale of the scores, times log2(e).
    qk_scale,
    P: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Tiles of a page.
    TILES: tl.constexpr = P // BLOCK_N
    pid = tl.program_id(0)
    # The longest tiles come first.
    pid_m = tiles_m - 1 - pid % tiles_m
    head_kv = pid // tiles_m % H_KV
    sequence = (pid // (tiles_m * H_KV)).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence)
    S = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    T = tl.load(context_lens_ptr + sequence)
    start_m = pid_m * BLOCK_M
    if start_m >= S * GROUPS:
        return

    # This tells the compiler that run-time strides are multiples of ALIGN, so that it can
    # vectorize loads.
    stride_qt, stride_qh = q_strides[0] // ALIGN * ALIGN, q_strides[1] // ALIGN * ALIGN
    stride_kp, stride_ks = k_strides[0] // ALIGN * ALIGN, k_strides[2] // ALIGN * ALIGN
    stride_vp, stride_vs = v_strides[0] // ALIGN * ALIGN, v_strides[2] // ALIGN * ALIGN
    k_ptr += head_kv.to(tl.int64) * (k_strides[1] // ALIGN * ALIGN)
    v_ptr += head_kv.to(tl.int64) * (v_strides[1] // ALIGN * ALIGN)
    block_table_ptr += sequence * stride_table

    # The heads of a token are neighboring rows.
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tokens, heads = offs_m // GROUPS, head_kv * GROUPS + offs_m % GROUPS
    mask_m = tokens < S
    offs_q = (begin + tokens).to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qh
    q = load_head(q_ptr, offs_q, mask_m, D, D_MAIN, D_REST, True)
    state = empty_state(BLOCK_M, D_MAIN, D_REST)

    # Every query sees all keys of the tiles [full, edge). The edges are the tiles [first, full) and
    # [edge, end).
    positions = T - S + tokens
    first_m = T - S + start_m // GROUPS
    last_m = T - S + (tl.minimum(start_m + BLOCK_M, S * GROUPS) - 1) // GROUPS
    first_key = tl.maximum(first_m - left, 0)
    first = first_key // BLOCK_N
    end = tl.cdiv(tl.maximum(last_m + 1, 0), BLOCK_N)
    full = tl.cdiv(tl.maximum(last_m - left, 0), BLOCK_N)
    edge = tl.maximum(tl.maximum(first_m + 1, 0) // BLOCK_N, full)

    offs_n = tl.arange(0, BLOCK_N)
    offs_kn, offs_vn = offs_n.to(tl.int64) * stride_ks, offs_n.to(tl.int64) * stride_vs
    page = tl.load(block_table_ptr + full // TILES, mask=full < edge, other=0)
    for tile in tl.range(full, edge):
        slot = tile % TILES * BLOCK_N
        if HAS_DESCRIPTORS:
            k = k_desc.load([page, head_kv, slot, 0]).reshape(BLOCK_N, D_MAIN)
            v = v_desc.load([page, head_kv, slot, 0]).reshape(BLOCK_N, D_MAIN)
            k_rest, v_rest = k, v
            if D_REST > 0:
                k_rest = k_rest_desc.load([page, head_kv, slot, D_MAIN])
                k_rest = k_rest.reshape(BLOCK_N, D_REST)
                v_rest = v_rest_desc.load([page, head_kv, slot, D_MAIN])
                v_rest = v_rest.reshape(BLOCK_N, D_REST)
            k, v = (k, k_rest), (v, v_rest)
        else:
            k_tile = k_ptr + page.to(tl.int64) * stride_kp + slot * stride_ks
            v_tile = v_ptr + page.to(tl.int64) * stride_vp + slot * stride_vs
            k = load_head(k_tile, offs_kn, mask_m, D, D_MAIN, D_REST, False)
            v = load_head(v_tile, offs_vn, mask_m, D, D_MAIN, D_REST, False)
        page = tl.load(block_table_ptr + (tile + 1) // TILES, mask=tile + 1 < edge, other=0)
        state = attend(state, q, k, v, mask_m, qk_scale, D_REST, False)

    # The edges have too few tiles for pipelining, which would need registers and cause spills.
    for i in tl.range(0, full - first + end - edge, num_stages=1):
        tile = tl.where(i < full - first, first, edge - (full - first)) + i
        page_id = tl.load(block_table_ptr + tile // TILES).to(tl.int64)
        slots = (tile % TILES * BLOCK_N + offs_n).to(tl.int64)
        keys = tile * BLOCK_N + offs_n
        # Other slots may hold anything, including NaN.
        mask_n = (keys >= first_key) & (keys < T)
        k = load_head(
            k_ptr, page_id * stride_kp + slots * stride_ks, mask_n, D, D_MAIN, D_REST, True
        )
        v = load_head(
            v_ptr, page_id * stride_vp + slots * stride_vs, mask_n, D, D_MAIN, D_REST, True
        )
        distance = keys[None, :] - positions[:, None]
        visible = mask_n[None, :] & (distance >= -left) & (distance <= 0)
        state = attend(state, q, k, v, visible, qk_scale, D_REST, True)

    out_rows = (begin + tokens).to(tl.int64) * (H_KV * GROUPS) + heads
    store_head(
        out_ptr,
        out_rows * D,
        mask_m,
        normalize(state, out_ptr.dtype.element_ty),
        D,
        D_MAIN,
        D_REST,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    scale: float | None = None,
    shared_prefixes: Tensor | None = None,
    plain: bool = False,
) -> Tensor:
    """Attend new queries ``q`` (T, H, D) causally to keys in pages: (T, H, D).

    ``k_cache`` and ``v_cache`` are (pages, H_KV, P, D). Token t of sequence b is in page
    ``block_table[b, t // P]`` at offset t % P. ``block_table`` is (B, pages of a sequence) int32.
    ``context_lens`` (B,) int32 counts the keys of each sequence. The keys of this step's queries
    are the last of them. ``cu_seqlens`` (B + 1,) int32 packs the queries. ``max_seqlen`` is at
    least the number of queries of any sequence. Rows of ``q`` past ``cu_seqlens[B]`` are padding,
    and their output is undefined.

    A query sees its own key and the ``window`` - 1 keys before it. Entries of ``block_table`` for
    pages that no query sees are never read. Scores are multiplied by ``scale``, 1 / sqrt(D) by
    default. ``shared_prefixes`` (B, 6) int32 says which leading pages several decoding sequences
    share, so that these are read once (``reference.attention.paged_attention``). With it, programs
    do not share the keys of a sequence, so a batch should have enough sequences for all SMs. Chunks,
    fp32 and head dims above 128 ignore it. P is a power of two of at least 16. D is at most 256. The last axes must be contiguous.
    Other strides are free. On Hopper a faster kernel computes the calls that
    ``paged_attention_hopper.supports``, unless ``plain``.

    Raises:
        ValueError: A shape, stride, device, ``window`` or ``scale`` does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, they differ, or an index is not int32.
    """
    check_shape("q", q, (None, None, None))
    T, H, D = q.shape
    check_shape("k_cache", k_cache, (None, None, None, D))
    _, H_KV, P, _ = k_cache.shape
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    check_heads(q, H_KV, k_cache=k_cache, v_cache=v_cache)
    if P < 16 or P & (P - 1):
        raise ValueError(
            f"k_cache must have pages of a power of two of at least 16 tokens, got {P}"
        )
    check_shape("context_lens", context_lens, (None,))
    B = context_lens.shape[0]
    check_shape("block_table", block_table, (B, None))
    check_shape("cu_seqlens", cu_seqlens, (B + 1,))
    indices = {
        "block_table": block_table,
        "context_lens": context_lens,
        "cu_seqlens": cu_seqlens,
    }
    for name, tensor in indices.items():
        check_dtype(name, tensor, torch.int32)
        check_rows(name, tensor)
    check_window(window)
    if shared_prefixes is not None:
        check_shape("shared_prefixes", shared_prefixes, (B, COLUMNS.value))
        check_dtype("shared_prefixes", shared_prefixes, torch.int32)
        if not shared_prefixes.is_contiguous():
            raise ValueError(
                f"shared_prefixes must be contiguous, got strides {shared_prefixes.stride()}"
            )
        check_device(q=q, shared_prefixes=shared_prefixes)
    qk_scale = base_two(scale, D)
    check_device(q=q, k_cache=k_cache, v_cache=v_cache, **indices)
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    if not out.numel() or not B:
        return out
    left = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    arguments = (q, k_cache, v_cache, block_table, context_lens, cu_seqlens)
    if max_seqlen == 1 and H // H_KV <= MAX_GROUPS:
        decode_attention(*arguments, out, left, qk_scale, shared_prefixes)
    elif not plain and is_hopper() and supports(q, k_cache, v_cache, left):
        paged_attention_hopper(*arguments, max_seqlen, out, left, qk_scale)
    else:
        _paged_attention_plain(*arguments, max_seqlen, out, left, qk_scale)
    return out


def _paged_attention_plain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
    left: int,
    qk_scale: float,
) -> None:
    H, D = q.shape[1:]
    _, H_KV, P, _ = k_cache.shape
    B = context_lens.shape[0]
    config = launch_config(max_seqlen * (H // H_KV), D, P, q.itemsize, current_arch())
    ALIGN = alignment(q, k_cache, v_cache)
    has_descriptors = can_have_descriptors(q.itemsize, ALIGN, current_arch())
    D_MAIN, D_REST = head_parts(D)
    tiles_m = triton.cdiv(max_seqlen * (H // H_KV), config.BLOCK_M)
    _paged_attention_kernel[(tiles_m * H_KV * B,)](
        q,
        k_cache,
        v_cache,
        out,
        *descriptors(k_cache, 1, 1, config.BLOCK_N, wanted=has_descriptors),
        *descriptors(v_cache, 1, 1, config.BLOCK_N, wanted=has_descriptors),
        block_table,
        context_lens,
        cu_seqlens,
        block_table.stride(0),
        q.stride()[:2],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        H_KV,
        H // H_KV,
        tiles_m,
        left,
        qk_scale,
        P=P,
        D=D,
        D_MAIN=D_MAIN,
        D_REST=D_REST,
        ALIGN=ALIGN,
        HAS_DESCRIPTORS=has_descriptors,
        **asdict(config),
    )
