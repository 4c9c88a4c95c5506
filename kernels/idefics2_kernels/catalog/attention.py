"""Rows of the catalog: attention."""

import math
from collections.abc import Iterable
from itertools import accumulate, pairwise, product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels import flash_attention, paged_attention, perceiver_attention
from idefics2_kernels.catalog.layouts import LAYOUTS, POISON, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.ops import REFERENCE

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WHOLE = 2**27  # scores in float64 that a GPU holds at once beside their softmax
_BLOCK = 2**24  # of them that one block of rows takes


def _name(*parts: object) -> str:
    return "-".join(str(part) for part in parts).replace("torch.", "").replace(" ", "")


def _cumulative(lengths: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _seen_to_one_side(length: int, reach: int) -> int:
    """Sum min(i, ``reach``) over i < ``length``: the keys that queries see before their own."""
    inside = min(reach, length - 1)
    return inside * (inside + 1) // 2 + (length - 1 - inside) * inside if length else 0


def _pairs(length: int, causal: bool, window: int | None) -> int:
    """Count the pairs of query and key that see each other."""
    one_side = _seen_to_one_side(length, length if window is None else window - 1)
    return length + (1 if causal else 2) * one_side


# flash_attention


def flash_attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Compute ``reference.flash_attention``, or only its ``rows`` (ascending) in blocks that fit into memory."""
    if rows is None:
        return REFERENCE.flash_attention(
            q, k, v, cu_seqlens, max_seqlen, causal=causal, window=window, scale=scale
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    parts = []
    offsets = cu_seqlens.tolist()
    for begin, end in pairwise(offsets):
        mine = rows[(rows >= begin) & (rows < end)]
        keys = torch.arange(begin, end, device=q.device)
        for block in mine.split(max(1, _BLOCK // max(1, end - begin))):
            hidden = torch.zeros(len(block), end - begin, dtype=torch.bool, device=q.device)
            if causal:
                hidden |= keys > block[:, None]
            if window is not None:
                hidden |= (keys - block[:, None]).abs() >= window
            heads = [
                _attend_head(
                    q[block, h],
                    k[begin:end, h // groups],
                    v[begin:end, h // groups],
                    hidden,
                    scale,
                )
                for h in range(q.shape[1])
            ]
            parts.append(torch.stack(heads, 1))
    return torch.cat(parts)


def _attend_head(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).t() * scale).masked_fill_(hidden, float("-inf"))
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


def _flash_inputs(case: Case, device: torch.device) -> Inputs:
    dims = case.dims
    lengths, H, H_KV, D = dims["lengths"], dims["H"], dims["H_KV"], dims["D"]
    T, layout = sum(lengths), dims.get("layout", "fused")

    def draw(*shape: int, **options: Any) -> Tensor:
        return normal(
            *shape, dtype=case.dtype, device=device, scale=dims.get("magnitude", 1.0), **options
        )

    if layout == "fused":  # as a projection to queries, keys and values leaves them
        q, k, v = draw(T, H + 2 * H_KV, D).split((H, H_KV, H_KV), 1)
    elif layout == "mixed":
        q, k, v = draw(T, H, D), draw(T, H_KV, D), draw(T, H_KV, D, layout="sliced")
    else:
        q, k, v = (draw(T, heads, D, layout=layout) for heads in (H, H_KV, H_KV))
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": _cumulative(lengths, device),
        "max_seqlen": max(lengths, default=0) + dims.get("slack", 0),
        "causal": dims["causal"],
        "window": dims.get("window"),
        "scale": dims.get("scale"),
    }


def _flash_cost(case: Case) -> Cost:
    dims = case.dims
    tokens, heads = sum(dims["lengths"]), dims["H"] + dims["H_KV"]
    pairs = sum(_pairs(n, dims["causal"], dims.get("window")) for n in dims["lengths"])
    return Cost(
        bytes=2 * tokens * heads * dims["D"] * case.dtype.itemsize,
        flops=4 * pairs * dims["H"] * dims["D"],
    )


def _flash_rows(case: Case, inputs: Inputs) -> Tensor | None:
    lengths, device = case.dims["lengths"], inputs["q"].device
    if case.dims["H"] * sum(n * n for n in lengths) <= _WHOLE:
        return None
    if max(lengths) <= 8192:
        return torch.arange(sum(lengths), device=device)
    picked = set()
    for begin, length in zip(accumulate((0, *lengths[:-1])), lengths, strict=True):
        window = case.dims.get("window") or length
        edges = (0, 128, length // 2 // 128 * 128, window, window + 128, length - 128, length)
        local = {edge + step for edge in edges for step in (-2, -1, 0, 1)}
        local |= set(range(0, length, length // 61))
        picked |= {begin + row for row in local if 0 <= row < length}
    return torch.tensor(sorted(picked), device=device)


def _flash(
    lengths: tuple[int, ...], H: int, H_KV: int, D: int, causal: bool = True, **dims: Any
) -> dict[str, Any]:
    return {"lengths": lengths, "H": H, "H_KV": H_KV, "D": D, "causal": causal, **dims}


def _flash_cases() -> tuple[Case, ...]:
    half = torch.float16
    cases = [
        Case(_name("ragged", dtype), _flash((67, 1, 0, 130), 2, 1, 72, False), dtype)
        for dtype in _DTYPES
    ]
    cases += [
        Case(_name("causal", dtype), _flash((129, 17), 4, 2, 16), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    cases += [
        Case(_name("window", window), _flash((200,), 1, 1, 64, window=window))
        for window in (1, 17, 64, 65, 100, 300)
    ]
    cases += [
        Case("window-full", _flash((150, 66), 1, 1, 96, False, window=40), torch.bfloat16),
        Case("window-128", _flash((300,), 1, 1, 128, window=128)),
        *(
            Case(_name("head-dim", D), _flash((70,), 2, 1, D), half)
            for D in (8, 40, 80, 96, 160, 256)
        ),
        Case("groups-of-8", _flash((33,), 8, 1, 128), torch.bfloat16),
        *(
            Case(_name(layout), _flash((40, 65), 2, 2, 72, False, layout=layout))
            for layout in LAYOUTS
        ),
        Case("no-tokens", _flash((), 2, 1, 72)),
        Case("empty", _flash((0, 0), 2, 1, 72)),
        Case("one", _flash((1,), 2, 1, 72)),
        Case("tiny", _flash((70,), 2, 1, 72, False, magnitude=1e-3)),
        Case(
            "large", _flash((70,), 2, 1, 72, magnitude=20.0)
        ),  # the first query's one score is low
        Case("mixed-layouts", _flash((40, 100), 2, 2, 72, False, layout="mixed")),
        Case("scale-and-slack", _flash((70, 3), 2, 1, 72, scale=0.3, slack=200)),
    ]
    return (*cases, *_flash_gpu_cases(), *_flash_model_cases())


def _flash_gpu_cases() -> list[Case]:
    """Products of lengths, masks and heads: sizes are run-time arguments, so that these compile little."""
    lengths = (
        (1, 2, 3, 0, 5),
        (61, 63, 64, 65, 67),
        (127, 128, 129, 131),
        (191, 193, 0, 1),
        (255, 256, 257),
        (383, 385, 17, 511),
        (1021, 31, 1),
        (1151, 1153),
        (2047, 2, 333),
    )
    masks: tuple[dict[str, Any], ...] = (
        {"causal": False},
        {"causal": True},
        {"causal": True, "window": 1},
        {"causal": True, "window": 63},
        {"causal": True, "window": 128},
        {"causal": True, "window": 193},
        {"causal": True, "window": 1000},
        {"causal": False, "window": 65},
        {"causal": False, "window": 300},
    )
    heads = ((8, 2, 128), (3, 3, 72))
    cases = [
        Case(
            _name("gpu", *packed, *mask.values(), D),
            _flash(packed, H, H_KV, D, **mask),
            torch.bfloat16,
            "gpu",
        )
        for packed, mask, (H, H_KV, D) in product(lengths, masks, heads)
    ]
    cases += [
        Case(
            _name("gpu-head-dim", D, dtype, *mask.values()),
            _flash((200, 1, 323), 4, 2, D, **mask),
            dtype,
            "gpu",
        )
        for (D, dtype), mask in product(
            (
                (8, torch.float16),
                (16, torch.float32),
                (40, torch.float16),
                (64, torch.bfloat16),
                (80, torch.float16),
                (96, torch.bfloat16),
                (128, torch.float32),
                (160, torch.float16),
                (256, torch.bfloat16),
            ),
            masks[:2],
        )
    ]
    cases += [
        Case(
            _name("gpu-heads", H, H_KV, layout),
            _flash((77, 300, 129), H, H_KV, 72, layout=layout),
            torch.float16,
            "gpu",
        )
        for (H, H_KV), layout in product(((4, 4), (4, 2), (4, 1), (8, 1), (32, 8)), LAYOUTS)
    ]
    return cases


def _flash_model_cases() -> list[Case]:
    # patches of images of the offline benchmark's sizes
    mixed = (34 * 45, 45 * 34, 52 * 70, 70 * 52, 27 * 27, 42 * 57, 70 * 70, 30 * 45)
    return [
        Case(name, dims, torch.bfloat16, "model")
        for name, dims in (
            ("text-causal-16k", _flash((16384,), 32, 8, 128)),
            ("text-causal-4k", _flash((4096,) * 4, 32, 8, 128)),
            ("text-causal-512", _flash((512,) * 16, 32, 8, 128)),
            ("text-window-16k", _flash((16384,), 32, 8, 128, window=4096)),
            ("text-window-32k", _flash((32768,), 32, 8, 128, window=4096)),
            ("vision-4900", _flash((4900,) * 4, 16, 16, 72, False)),
            ("vision-1225", _flash((1225,) * 16, 16, 16, 72, False)),
            ("vision-mixed", _flash(mixed, 16, 16, 72, False)),
        )
    ]


# paged_attention


def _paged_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw a cache whose pages lie in any order; whatever no query may see is NaN or an impossible page."""
    dims = case.dims
    queries, contexts, P = dims["queries"], dims["contexts"], dims.get("P", 64)
    H, H_KV, D, window = dims["H"], dims["H_KV"], dims["D"], dims.get("window")
    spans = [  # pages in reach of each sequence
        (0 if window is None else max(T - S - window + 1, 0) // P, -(-T // P))
        for S, T in zip(queries, contexts, strict=True)
    ]
    widest = max((end for _, end in spans), default=0) + dims.get("spare", 1)
    used = sum(end - first for first, end in spans)
    order = torch.randperm(used + 2, device=device).int()
    shape = (used + 2, H_KV, P, D)
    caches = [normal(*shape, dtype=case.dtype, device=device) for _ in range(2)]
    block_table = torch.full((len(queries), widest), 2**31 - 1, dtype=torch.int32, device=device)
    given = 0
    for b, (first, end) in enumerate(spans):
        block_table[b, first:end] = order[given : given + end - first]
        given += end - first
    for cache in caches:
        cache[order[used:].long()] = POISON
        for (_, end), pages, T in zip(spans, block_table, contexts, strict=True):
            if T % P:
                cache[pages[end - 1].long(), :, T % P :] = POISON
    layout = dims.get("layout", "plain")
    if layout == "fused":  # keys and values of a page side by side
        k_cache, v_cache = torch.stack(caches, 1).unbind(1)
    elif layout == "slot-major":  # a page's heads lie side by side
        k_cache, v_cache = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches)
    elif layout == "mixed":
        k_cache, v_cache = caches[0], caches[1].transpose(1, 2).contiguous().transpose(1, 2)
    else:
        k_cache, v_cache = caches
    q_layout = dims.get("q_layout", "plain")
    return {
        "q": normal(sum(queries), H, D, dtype=case.dtype, device=device, layout=q_layout),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device=device),
        "cu_seqlens": _cumulative(queries, device),
        "max_seqlen": max(queries, default=0) + dims.get("slack", 0),
        "window": window,
        "scale": dims.get("scale"),
    }


def _paged_cost(case: Case) -> Cost:
    dims = case.dims
    window = dims.get("window")
    keys = pairs = 0
    for S, T in zip(dims["queries"], dims["contexts"], strict=True):
        reach = T if window is None else min(T, S + window - 1)
        keys += reach
        # those a causal sequence of all T tokens has, less those of its first T - S
        pairs += _pairs(T, True, window) - _pairs(T - S, True, window)
    rows = 2 * sum(dims["queries"]) * dims["H"] + 2 * keys * dims["H_KV"]
    return Cost(
        bytes=rows * dims["D"] * case.dtype.itemsize, flops=4 * pairs * dims["H"] * dims["D"]
    )


def _paged(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    H: int,
    H_KV: int,
    D: int = 128,
    **dims: Any,
) -> dict[str, Any]:
    return {"queries": queries, "contexts": contexts, "H": H, "H_KV": H_KV, "D": D, **dims}


def _paged_cases() -> tuple[Case, ...]:
    cases = [
        Case(_name("chunks", dtype), _paged((3, 0, 40), (130, 5, 40), 2, 1, 72), dtype)
        for dtype in _DTYPES
    ]
    cases += [
        Case(_name("decode", dtype), _paged((1, 0, 1), (130, 7, 64), 4, 2), dtype)
        for dtype in _DTYPES
    ]
    cases += [
        Case(_name(kind, "window", window), _paged(queries, (100, 38), 2, 1, P=16, window=window))
        for (kind, queries), window in product(
            (("decode", (1, 1)), ("chunks", (20, 2))), (1, 16, 17, 20, 300)
        )
    ]
    cases += [
        Case("decode-pages-of-16", _paged((1,), (67,), 2, 2, P=16)),
        Case("chunks-pages-of-16", _paged((5,), (67,), 2, 2, P=16)),
        Case("decode-many-pages", _paged((1,), (600,), 2, 1, P=16)),
        Case("decode-pages-of-256", _paged((1,), (600,), 1, 1, P=256, window=400)),
        Case("chunks-pages-of-256", _paged((9,), (600,), 1, 1, P=256, window=400)),
        Case("decode-groups-of-32", _paged((1,), (70,), 32, 1, 96), torch.bfloat16),
        Case("chunks-groups-of-8", _paged((5, 20), (70, 20), 16, 2, 96), torch.bfloat16),
        Case("decode-fused", _paged((1, 1), (70, 3), 4, 2, layout="fused", q_layout="sliced")),
        Case("chunks-fused", _paged((2, 3), (70, 3), 4, 2, layout="fused", q_layout="sliced")),
        Case("decode-slot-major", _paged((1, 1), (70, 3), 2, 2, layout="slot-major")),
        Case("chunks-slot-major", _paged((2, 3), (70, 3), 2, 2, layout="slot-major")),
        Case("decode-mixed", _paged((1, 1), (70, 3), 2, 2, layout="mixed")),
        Case("chunks-mixed", _paged((2, 3), (70, 3), 2, 2, layout="mixed", q_layout="transposed")),
        Case("decode-offset", _paged((1, 1), (70, 3), 2, 2, 8, q_layout="offset")),
        Case("chunks-offset", _paged((2, 3), (70, 3), 2, 2, 8, q_layout="offset")),
        Case("decode-without-keys", _paged((1, 1), (0, 9), 2, 1)),
        Case("chunks-without-keys", _paged((3, 2), (2, 9), 2, 1)),
        Case("no-queries", _paged((0, 0), (70, 3), 2, 1)),
        Case("scale-and-slack", _paged((2,), (70,), 2, 1, 160, scale=0.3, slack=200)),
        Case("decode-256", _paged((1,), (70,), 2, 1, 256)),
    ]
    return (*cases, *_paged_gpu_cases(), *_paged_model_cases())


def _paged_gpu_cases() -> list[Case]:
    """Products of lengths, windows and heads: sizes are run-time arguments, so that these compile little."""
    batches = (
        ((1, 1, 1, 0, 1), (1, 2, 63, 5, 64)),
        ((1, 1, 1), (65, 1021, 4099)),
        ((1,) * 9, (127, 128, 129, 255, 256, 257, 511, 512, 513)),
        ((1,), (8191,)),
        ((5, 1, 0, 31), (5, 300, 9, 1031)),
        ((63, 64, 65), (1000, 64, 641)),
        ((127, 129, 257), (128, 1153, 2047)),
        ((2, 3, 7, 15, 16), (66, 67, 129, 640, 16)),
        ((1, 2048, 33), (1, 2048, 33)),
        ((512, 1, 1), (1536, 777, 64)),
    )
    windows = (None, 1, 63, 64, 100, 1024)
    cases = [
        Case(
            _name("gpu", "x".join(map(str, queries)), *contexts[:3], window, H, H_KV),
            _paged(queries, contexts, H, H_KV, window=window),
            torch.bfloat16,
            "gpu",
        )
        for (queries, contexts), window, (H, H_KV) in product(batches, windows, ((32, 8), (3, 3)))
    ]
    cases += [
        Case(
            _name("gpu-head-dim", D, dtype, *queries),
            _paged(queries, (300, 77), 4, 2, D, window=200),
            dtype,
            "gpu",
        )
        for (D, dtype), queries in product(
            (
                (8, torch.float16),
                (16, torch.float16),
                (40, torch.float16),
                (64, torch.float16),
                (72, torch.bfloat16),
                (80, torch.float16),
                (96, torch.bfloat16),
                (128, torch.float32),
                (160, torch.float16),
                (256, torch.bfloat16),
            ),
            ((1, 1), (40, 77)),
        )
    ]
    cases += [
        Case(
            _name("gpu-pages", P, layout, *queries, H_KV),
            _paged(queries, (300, 77), H, H_KV, P=P, layout=layout),
            torch.float16,
            "gpu",
        )
        for P, layout, (queries, H, H_KV) in product(
            (16, 64, 256),
            ("plain", "fused", "slot-major"),
            (((1, 1), 8, 1), ((1, 1), 4, 4), ((40, 77), 8, 1), ((3, 2), 4, 2)),
        )
    ]
    return cases


def _paged_model_cases() -> list[Case]:
    cases = [
        Case(
            f"decode-b{B}-s{T}",
            _paged((1,) * B, (T,) * B, 32, 8, window=4096, spare=0),
            torch.bfloat16,
            "model",
        )
        for B, T in ((1, 512), (1, 4096), (16, 2048), (64, 1024), (128, 512))
    ]
    chunk = _paged((512,) * 4, (512, 1024, 2048, 4096), 32, 8, window=4096)
    return [*cases, Case("chunk-512", chunk, torch.bfloat16, "model")]


# perceiver_attention


def _perceiver_inputs(case: Case, device: torch.device) -> Inputs:
    dims = case.dims
    lengths, L, H, H_KV, D = (dims[name] for name in ("lengths", "L", "H", "H_KV", "D"))
    N, P, layout = len(lengths), sum(lengths), dims.get("layout", "fused")

    def draw(*shape: int, **options: Any) -> Tensor:
        return normal(
            *shape, dtype=case.dtype, device=device, scale=dims.get("magnitude", 1.0), **options
        )

    if layout == "fused":  # as a projection to keys and values leaves them
        k_context, v_context = draw(P, 2, H_KV, D).unbind(1)
        k_latents, v_latents = draw(N, L, 2, H_KV, D).unbind(2)
        q = draw(N, L, H, D)
    elif layout == "mixed":
        q, k_context, v_latents = draw(N, L, H, D), draw(P, H_KV, D), draw(N, L, H_KV, D)
        v_context = draw(P, H_KV, D, layout="sliced")
        k_latents = draw(N, L, H_KV, D, layout="sliced")
    else:
        k_context, v_context = (draw(P, H_KV, D, layout=layout) for _ in range(2))
        k_latents, v_latents = (draw(N, L, H_KV, D, layout=layout) for _ in range(2))
        q = draw(N, L, H, D, layout=layout)
    return {
        "q": q,
        "k_context": k_context,
        "v_context": v_context,
        "k_latents": k_latents,
        "v_latents": v_latents,
        "cu_seqlens": _cumulative(lengths, device),
        "max_seqlen": max(lengths, default=0) + dims.get("slack", 0),
        "scale": dims.get("scale"),
    }


def _perceiver_cost(case: Case) -> Cost:
    dims = case.dims
    N, P, L = len(dims["lengths"]), sum(dims["lengths"]), dims["L"]
    rows = 2 * N * L * dims["H"] + 2 * (P + N * L) * dims["H_KV"]
    return Cost(
        bytes=rows * dims["D"] * case.dtype.itemsize,
        flops=4 * L * (P + N * L) * dims["H"] * dims["D"],
    )


def _perceiver(
    lengths: tuple[int, ...], L: int = 64, H: int = 16, H_KV: int = 4, D: int = 96, **dims: Any
) -> dict[str, Any]:
    return {"lengths": lengths, "L": L, "H": H, "H_KV": H_KV, "D": D, **dims}


def _perceiver_cases() -> tuple[Case, ...]:
    cases = [
        Case(_name("ragged", dtype), _perceiver((130, 0, 1), 3, 4, 2), dtype) for dtype in _DTYPES
    ]
    cases += [
        Case(_name("patches", T), _perceiver((T,), 3, 2, 1, 72), torch.bfloat16)
        for T in (63, 64, 65, 200)
    ]
    cases += [
        Case(_name("latents", L), _perceiver((70,), L, 4, 2, 16)) for L in (1, 31, 32, 33, 64, 65)
    ]
    cases += [
        Case(_name("groups", H, H_KV), _perceiver((70, 30), 5, H, H_KV, 16))
        for H, H_KV in ((3, 3), (3, 1), (8, 1))
    ]
    cases += [
        Case(_name("head-dim", D), _perceiver((70,), 5, 2, 1, D)) for D in (8, 40, 128, 160, 256)
    ]
    cases += [
        Case(_name(layout), _perceiver((70, 30), 5, 2, 2, layout=layout)) for layout in LAYOUTS
    ]
    cases += [
        Case("several-tiles-a-split", _perceiver((1100,), 3, 2, 1, 72)),
        Case("mixed-layouts", _perceiver((70, 30), 5, 2, 2, layout="mixed")),
        Case("no-images", _perceiver(())),
        Case("no-patches", _perceiver((0, 0), 5, 2, 1)),
        Case("tiny", _perceiver((70,), 5, 2, 1, magnitude=1e-3)),
        Case("large", _perceiver((70,), 5, 2, 1, magnitude=6.0)),
        Case("scale-and-slack", _perceiver((70, 3), 5, 2, 1, scale=0.3, slack=2000)),
    ]
    return (*cases, *_perceiver_gpu_cases(), *_perceiver_model_cases())


def _perceiver_gpu_cases() -> list[Case]:
    """Products of lengths, latents and heads: sizes are run-time arguments, so that these compile little."""
    lengths = (
        (1,),
        (2, 0, 3),
        (61, 63, 64, 65, 67),
        (127, 128, 129, 131),
        (255, 257, 0, 1),
        (729, 730, 731),
        (1225,),
        (2047, 2, 333),
        (4900, 4899),
        (37,) * 40,
    )
    cases = [
        Case(
            _name("gpu", *packed[:5], L, H, H_KV, D),
            _perceiver(packed, L, H, H_KV, D),
            torch.bfloat16,
            "gpu",
        )
        for packed, L, (H, H_KV, D) in product(
            lengths, (1, 31, 64, 65, 129), ((16, 4, 96), (3, 3, 96), (8, 1, 72))
        )
    ]
    cases += [
        Case(
            _name("gpu-head-dim", D, dtype, L), _perceiver((200, 1, 323), L, 4, 2, D), dtype, "gpu"
        )
        for (D, dtype), L in product(
            (
                (8, torch.float16),
                (16, torch.float16),
                (40, torch.float16),
                (64, torch.bfloat16),
                (80, torch.float16),
                (96, torch.float32),
                (128, torch.bfloat16),
                (160, torch.float16),
                (256, torch.bfloat16),
            ),
            (7, 64),
        )
    ]
    cases += [
        Case(
            _name("gpu-heads", H, H_KV, layout),
            _perceiver((77, 300, 129), 33, H, H_KV, layout=layout),
            torch.float16,
            "gpu",
        )
        for (H, H_KV), layout in product(((4, 4), (4, 2), (4, 1), (8, 1)), LAYOUTS)
    ]
    return cases


def _perceiver_model_cases() -> list[Case]:
    return [
        Case(name, _perceiver(lengths), torch.bfloat16, "model")
        for name, lengths in (
            ("perceiver-4964", (4900,) * 8),
            ("perceiver-793", (729,) * 32),
            ("perceiver-1x4964", (4900,)),
        )
    ]


ATTENTION = (
    KernelSpec(
        name="flash_attention",
        make_inputs=_flash_inputs,
        cases=_flash_cases(),
        cost=_flash_cost,
        implementations={"triton": flash_attention.flash_attention},
        checked_rows=_flash_rows,
        reference=flash_attention_rows,
    ),
    KernelSpec(
        name="paged_attention",
        make_inputs=_paged_inputs,
        cases=_paged_cases(),
        cost=_paged_cost,
        implementations={"triton": paged_attention.paged_attention},
    ),
    KernelSpec(
        name="perceiver_attention",
        make_inputs=_perceiver_inputs,
        cases=_perceiver_cases(),
        cost=_perceiver_cost,
        implementations={"triton": perceiver_attention.perceiver_attention},
    ),
)
