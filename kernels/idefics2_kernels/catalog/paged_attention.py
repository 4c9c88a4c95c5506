"""Row of the catalog: attention to keys in pages."""

from functools import wraps
from itertools import product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.attention import paged_attention
from idefics2_kernels.attention.paged_attention_hopper import PAGE_SIZE
from idefics2_kernels.attention.shared_prefix import COLUMNS, max_members
from idefics2_kernels.attention.warp_specialized import HEAD_DIMS
from idefics2_kernels.catalog.attention import (
    DTYPES,
    case_name,
    cumulative,
    on_hopper,
    visible_pairs,
)
from idefics2_kernels.catalog.layouts import POISON, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec

# Sequences, pages that they share, and the parts that these are divided into.
_Group = tuple[tuple[int, ...], int, int]


def _shared_prefixes(groups: tuple[_Group, ...], B: int, limit: int) -> list[list[int]]:
    """Return the table (B, 6) of ``groups``, with items of at most ``limit`` members.

    Items are given to the last sequences, so most of them arrive after their members. Undefined
    entries are invalid.
    """
    members: list[int] = []
    items: list[tuple[int, int, int]] = []
    table = [[0, 0, 2**31 - 1, 9, 9, 2**31 - 1] for _ in range(B)]
    for sequences, pages, parts in groups:
        begins = range(len(members), len(members) + len(sequences), limit)
        members += sequences
        items += product(begins, (len(members),), range(parts))
        for b in sequences:
            table[b][:2] = [pages, parts]
    for row, member in zip(table, members, strict=False):
        row[2] = member
    for row, (begin, end, part) in zip(reversed(table), items, strict=False):
        row[3:] = [begin, min(begin + limit, end), part]
    assert len(items) <= B
    return table


def _paged_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw a cache with its pages in random order.

    Keys and values that no query sees are NaN, and unused entries of the block table are invalid.
    """
    dims = case.dims
    queries, contexts, P = dims["queries"], dims["contexts"], dims.get("P", 64)
    H, H_KV, D, window = dims["H"], dims["H_KV"], dims["D"], dims.get("window")
    # The pages in reach of each sequence, from first to end.
    spans = [
        (0 if window is None else max(T - S - window + 1, 0) // P, -(-T // P))
        for S, T in zip(queries, contexts, strict=True)
    ]
    widest = max((end for _, end in spans), default=0) + dims.get("spare", 1)
    groups: tuple[_Group, ...] = dims.get("shared", ())
    used = sum(end - first for first, end in spans)
    order = torch.randperm(used + 2, device=device).int()
    shape = (used + 2, H_KV, P, D)
    caches = [normal(*shape, dtype=case.dtype, device=device) for _ in range(2)]
    block_table = torch.full((len(queries), widest), 2**31 - 1, dtype=torch.int32, device=device)
    given = 0
    for b, (first, end) in enumerate(spans):
        block_table[b, first:end] = order[given : given + end - first]
        given += end - first
    for sequences, pages, _parts in groups:
        block_table[list(sequences), :pages] = block_table[sequences[0], :pages].clone()
    for cache in caches:
        cache[order[used:].long()] = POISON
        for (_, end), pages, T in zip(spans, block_table, contexts, strict=True):
            if T % P:
                cache[pages[end - 1].long(), :, T % P :] = POISON
    layout = dims.get("layout", "plain")
    # The keys and values of a page are neighbors.
    if layout == "fused":
        k_cache, v_cache = torch.stack(caches, 1).unbind(1)
    # The heads of a slot are neighbors.
    elif layout == "slot-major":
        k_cache, v_cache = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches)
    elif layout == "mixed":
        k_cache, v_cache = caches[0], caches[1].transpose(1, 2).contiguous().transpose(1, 2)
    else:
        k_cache, v_cache = caches
    q_layout = dims.get("q_layout", "plain")
    shared = None
    if "shared" in dims:
        table = _shared_prefixes(groups, len(queries), max_members(H // H_KV))
        shared = torch.tensor(table, dtype=torch.int32, device=device).view(-1, COLUMNS.value)
    return {
        "q": normal(sum(queries), H, D, dtype=case.dtype, device=device, layout=q_layout),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device=device),
        "cu_seqlens": cumulative(queries, device),
        "max_seqlen": max(queries, default=0) + dims.get("slack", 0),
        "window": window,
        "scale": dims.get("scale"),
        "shared_prefixes": shared,
    }


def _paged_cost(case: Case) -> Cost:
    dims = case.dims
    window = dims.get("window")
    keys = pairs = 0
    for S, T in zip(dims["queries"], dims["contexts"], strict=True):
        reach = T if window is None else min(T, S + window - 1)
        keys += reach
        # The pairs of a causal sequence of T tokens, without those of its first T - S queries.
        pairs += visible_pairs(T, True, window) - visible_pairs(T - S, True, window)
    for sequences, pages, _parts in dims.get("shared", ()):
        keys -= (len(sequences) - 1) * pages * dims.get("P", 64)
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
        Case(case_name("chunks", dtype), _paged((3, 0, 40), (130, 5, 40), 2, 1, 72), dtype)
        for dtype in DTYPES
    ]
    cases += [
        Case(case_name("decode", dtype), _paged((1, 0, 1), (130, 7, 64), 4, 2), dtype)
        for dtype in DTYPES
    ]
    cases += [
        Case(
            case_name(kind, "window", window), _paged(queries, (100, 38), 2, 1, P=16, window=window)
        )
        for (kind, queries), window in product(
            (("decode", (1, 1)), ("chunks", (20, 2))), (1, 16, 17, 20, 300)
        )
    ]
    cases += [
        Case("decode-pages-of-16", _paged((1,), (67,), 2, 2, P=16)),
        Case("chunks-pages-of-16", _paged((5,), (67,), 2, 2, P=16)),
        Case("decode-many-pages", _paged((1,), (520,), 2, 1, P=16)),
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
    return (
        *cases,
        *_shared_cases(),
        *_paged_gpu_cases(),
        *_shared_gpu_cases(),
        *_paged_model_cases(),
    )


def _shared_cases() -> list[Case]:
    """Return decode steps whose sequences share prefixes."""
    ones = (1,) * 9
    contexts = (33, 40, 50, 64, 90, 17, 49, 1, 97)
    two_groups = (((0, 6, 2, 3), 2, 2), ((4, 8), 5, 3))
    cases = [
        Case(
            case_name("shared", dtype),
            _paged(ones, contexts, 4, 2, 16, P=16, shared=two_groups),
            dtype,
        )
        for dtype in DTYPES[1:]
    ]
    cases += [
        Case("shared-nothing", _paged(ones, contexts, 4, 2, 16, P=16, shared=())),
        # Items belong to programs of padding as well.
        Case(
            "shared-padded",
            _paged((1, 1, 1, 1, 1, 0, 1, 0, 1), contexts, 4, 2, 16, P=16, shared=two_groups),
        ),
        Case(
            "shared-window",
            _paged(ones, contexts, 4, 2, 16, P=16, window=70, shared=two_groups[:1]),
        ),
        Case(
            "shared-seven-parts",
            _paged(
                (1,) * 12,
                (129,) * 12,
                4,
                2,
                16,
                P=16,
                layout="mixed",
                shared=(((8, 0), 8, 4), ((3, 5), 7, 7)),
            ),
        ),
        Case(
            "shared-pages-of-256",
            _paged(
                (1,) * 3,
                (513, 300, 700),
                2,
                2,
                P=256,
                layout="mixed",
                shared=(((2, 0), 2, 1),),
            ),
        ),
        # Two items of at most 21 members with three rows each.
        Case(
            "shared-by-24",
            _paged((1,) * 24, (40,) * 24, 3, 1, 24, P=16, shared=((tuple(range(24)), 2, 1),)),
            torch.bfloat16,
        ),
        Case(
            "shared-head-dim-72",
            _paged((1,) * 5, (80,) * 5, 6, 2, 72, shared=(((4, 3, 1), 1, 1),), layout="fused"),
            torch.bfloat16,
        ),
        Case(
            "shared-groups-of-16",
            _paged((1,) * 6, (80,) * 6, 32, 2, P=16, shared=((tuple(range(6)), 4, 2),), scale=0.3),
        ),
        # Items of these are not computed.
        Case(
            "shared-float32",
            _paged((1,) * 2, (40, 50), 2, 1, 16, P=16, shared=(((1, 0), 2, 1),)),
            torch.float32,
        ),
        Case("shared-chunk", _paged((1, 3), (40, 50), 2, 1, P=16, shared=(((1, 0), 2, 1),))),
        Case(
            "shared-head-dim-160",
            _paged((1,) * 4, (40,) * 4, 2, 2, 160, P=16, shared=(((1, 0), 2, 1),)),
        ),
    ]
    return cases


def _shared_gpu_cases() -> list[Case]:
    cases = []
    for B, own, (H, H_KV), (pages, parts) in product(
        (40, 130), (1, 64, 70), ((32, 8), (8, 8)), ((2, 1), (17, 7))
    ):
        order = [7 * b % B for b in range(B)]
        # One group of nearly all, two of a few, and one sequence alone.
        groups = ((tuple(order[9:]), pages, parts), (tuple(order[:5]), 3, 2), ((order[6],), 2, 2))
        contexts = tuple(64 * max(pages, 3) + own + b % 5 for b in range(B))
        cases.append(
            Case(
                case_name("gpu-shared", B, own, H, pages),
                _paged((1,) * B, contexts, H, H_KV, window=4096, shared=groups),
                torch.bfloat16,
                "gpu",
            )
        )
    return cases


def _paged_gpu_cases() -> list[Case]:
    """Return the product of lengths, windows and heads.

    Sizes are run-time arguments, so these cases compile few kernels.
    """
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
            case_name("gpu", "x".join(map(str, queries)), *contexts[:3], window, H, H_KV),
            _paged(queries, contexts, H, H_KV, window=window),
            torch.bfloat16,
            "gpu",
        )
        for (queries, contexts), window, (H, H_KV) in product(batches, windows, ((32, 8), (3, 3)))
    ]
    cases += [
        Case(
            case_name("gpu-head-dim", D, dtype, *queries),
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
            case_name("gpu-pages", P, layout, *queries, H_KV),
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
    # One image and 1,000 tokens are shared, and each sequence has 24 of its own and a half answer.
    cases += [
        Case(
            f"decode-shared-b{B}-s1088",
            _paged(
                (1,) * B,
                (1088,) * B,
                32,
                8,
                window=4096,
                spare=0,
                shared=((tuple(range(B)), 16, parts),),
            ),
            torch.bfloat16,
            "model",
        )
        for B, parts in ((64, 7), (256, 2))
    ]
    for name, queries, contexts in (
        ("chunk-512", (512,) * 4, (512, 1024, 2048, 4096)),
        ("chunk-512-of-8k", (512,) * 8, (8192,) * 8),
        ("chunk-2048", (2048,), (8192,)),
        ("prefill-2k", (2048,) * 4, (2048,) * 4),
        ("prefill-4k", (4096,), (4096,)),
        ("chunk-and-decode", (512, *(1,) * 48), (4096, *(2048,) * 48)),
    ):
        dims = _paged(queries, contexts, 32, 8, window=4096)
        cases.append(Case(name, dims, torch.bfloat16, "model"))
    return cases


@wraps(paged_attention.paged_attention)
def _plain(*args: Any, **kwargs: Any) -> Tensor:
    return paged_attention.paged_attention(*args, **kwargs, plain=True)


def _has_gluon(case: Case) -> bool:
    """Return whether the Gluon kernel computes this case.

    It computes cases other than decoding, compiled for Hopper.
    """
    dims = case.dims
    window = dims.get("window")
    return (
        on_hopper()
        and max(dims["queries"]) + dims.get("slack", 0) > 1
        and sum(dims["queries"]) > 0
        and dims["D"] in HEAD_DIMS
        and dims.get("P", PAGE_SIZE) == PAGE_SIZE
        and case.dtype.itemsize == 2
        and (window is None or window >= PAGE_SIZE)
    )


PAGED_ATTENTION = KernelSpec(
    name="paged_attention",
    make_inputs=_paged_inputs,
    cases=_paged_cases(),
    cost=_paged_cost,
    implementations={"triton": paged_attention.paged_attention, "plain": _plain},
    only={"plain": _has_gluon},
)
