"""Row of the catalog: attention within packed sequences."""

import math
import random
from functools import wraps
from itertools import accumulate, pairwise, product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.attention import flash_attention
from idefics2_kernels.attention.warp_specialized import HEAD_DIMS
from idefics2_kernels.catalog.attention import (
    DTYPES,
    case_name,
    cumulative,
    on_hopper,
    visible_pairs,
)
from idefics2_kernels.catalog.layouts import LAYOUTS, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.ops import REFERENCE

# Scores in float64 that fit on a GPU at once together with their softmax.
_WHOLE = 2**27
# Scores of one block of rows.
_BLOCK = 2**24


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
    """Compute the reference's ``flash_attention``, or only its ``rows`` (ascending).

    Selected rows are computed in blocks that fit into memory.
    """
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


def flash_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``flash_attention``."""
    dims = case.dims
    lengths, H, H_KV, D = dims["lengths"], dims["H"], dims["H_KV"], dims["D"]
    T, layout = sum(lengths), dims.get("layout", "fused")

    def draw(*shape: int, **options: Any) -> Tensor:
        return normal(
            *shape, dtype=case.dtype, device=device, scale=dims.get("magnitude", 1.0), **options
        )

    # The fused layout is that of the output of a projection to queries, keys and values.
    if layout == "fused":
        q, k, v = draw(T, H + 2 * H_KV, D).split((H, H_KV, H_KV), 1)
    elif layout == "mixed":
        q, k, v = draw(T, H, D), draw(T, H_KV, D), draw(T, H_KV, D, layout="sliced")
    else:
        q, k, v = (draw(T, heads, D, layout=layout) for heads in (H, H_KV, H_KV))
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": cumulative(lengths, device),
        "max_seqlen": max(lengths, default=0) + dims.get("slack", 0),
        "causal": dims["causal"],
        "window": dims.get("window"),
        "scale": dims.get("scale"),
    }


def _flash_cost(case: Case) -> Cost:
    dims = case.dims
    tokens, heads = sum(dims["lengths"]), dims["H"] + dims["H_KV"]
    pairs = sum(visible_pairs(n, dims["causal"], dims.get("window")) for n in dims["lengths"])
    return Cost(
        bytes=2 * tokens * heads * dims["D"] * case.dtype.itemsize,
        flops=4 * pairs * dims["H"] * dims["D"],
    )


def flash_rows(case: Case, inputs: Inputs) -> Tensor | None:
    """Return the rows to check of a case that is too large for a whole score matrix."""
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


def flash_cases() -> tuple[Case, ...]:
    """Return the cases of attention within packed sequences."""
    half = torch.float16
    cases = [
        Case(case_name("ragged", dtype), _flash((67, 1, 0, 130), 2, 1, 72, False), dtype)
        for dtype in DTYPES
    ]
    cases += [
        Case(case_name("causal", dtype), _flash((129, 17), 4, 2, 16), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    cases += [
        Case(case_name("window", window), _flash((200,), 1, 1, 64, window=window))
        for window in (1, 17, 64, 65, 100, 300)
    ]
    cases += [
        Case("window-full", _flash((150, 66), 1, 1, 96, False, window=40), torch.bfloat16),
        Case("window-128", _flash((300,), 1, 1, 128, window=128)),
        *(
            Case(case_name("head-dim", D), _flash((70,), 2, 1, D), half)
            for D in (8, 40, 80, 96, 160, 256)
        ),
        Case("groups-of-8", _flash((33,), 8, 1, 128), torch.bfloat16),
        *(
            Case(case_name(layout), _flash((40, 65), 2, 2, 72, False, layout=layout))
            for layout in LAYOUTS
        ),
        Case("no-tokens", _flash((), 2, 1, 72)),
        Case("empty", _flash((0, 0), 2, 1, 72)),
        Case("one", _flash((1,), 2, 1, 72)),
        Case("tiny", _flash((70,), 2, 1, 72, False, magnitude=1e-3)),
        # The only score of the first query is low.
        Case("large", _flash((70,), 2, 1, 72, magnitude=20.0)),
        Case("mixed-layouts", _flash((40, 100), 2, 2, 72, False, layout="mixed")),
        Case("scale-and-slack", _flash((70, 3), 2, 1, 72, scale=0.3, slack=200)),
    ]
    return (*cases, *_flash_gpu_cases(), *_flash_model_cases())


def _flash_gpu_cases() -> list[Case]:
    """Return the product of lengths, masks and heads.

    Sizes are run-time arguments, so these cases compile few kernels.
    """
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
            case_name("gpu", *packed, *mask.values(), D),
            _flash(packed, H, H_KV, D, **mask),
            torch.bfloat16,
            "gpu",
        )
        for packed, mask, (H, H_KV, D) in product(lengths, masks, heads)
    ]
    cases += [
        Case(
            case_name("gpu-head-dim", D, dtype, *mask.values()),
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
            case_name("gpu-heads", H, H_KV, layout),
            _flash((77, 300, 129), H, H_KV, 72, layout=layout),
            torch.float16,
            "gpu",
        )
        for (H, H_KV), layout in product(((4, 4), (4, 2), (4, 1), (8, 1), (32, 8)), LAYOUTS)
    ]
    return cases


def _flash_model_cases() -> list[Case]:
    # The sides of 16 images, in patches.
    sides = random.Random(0)
    mixed = tuple(sides.randint(27, 70) * sides.randint(27, 70) for _ in range(16))
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


@wraps(flash_attention.flash_attention)
def _plain(*args: Any, **kwargs: Any) -> Tensor:
    return flash_attention.flash_attention(*args, **kwargs, plain=True)


def _has_gluon(case: Case) -> bool:
    """Return whether the Gluon kernel computes this case, which needs compilation for Hopper."""
    dims = case.dims
    return (
        on_hopper()
        and dims["D"] in HEAD_DIMS
        and case.dtype.itemsize == 2
        # Rows of this layout are not aligned.
        and dims.get("layout") != "offset"
        and sum(dims["lengths"]) > 0
    )


FLASH_ATTENTION = KernelSpec(
    name="flash_attention",
    make_inputs=flash_inputs,
    cases=flash_cases(),
    cost=_flash_cost,
    implementations={"triton": flash_attention.flash_attention, "plain": _plain},
    only={"plain": _has_gluon},
    checked_rows=flash_rows,
    reference=flash_attention_rows,
)
