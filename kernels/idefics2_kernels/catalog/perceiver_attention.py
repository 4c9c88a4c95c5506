"""Row of the catalog: attention of latents to patches and to themselves."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.attention import perceiver_attention
from idefics2_kernels.catalog.attention import DTYPES, case_name, cumulative
from idefics2_kernels.catalog.layouts import LAYOUTS, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec


def _perceiver_inputs(case: Case, device: torch.device) -> Inputs:
    dims = case.dims
    lengths, L, H, H_KV, D = (dims[name] for name in ("lengths", "L", "H", "H_KV", "D"))
    N, P, layout = len(lengths), sum(lengths), dims.get("layout", "fused")

    def draw(*shape: int, **options: Any) -> Tensor:
        return normal(
            *shape, dtype=case.dtype, device=device, scale=dims.get("magnitude", 1.0), **options
        )

    # The fused layout is that of the output of a projection to keys and values.
    if layout == "fused":
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
        "cu_seqlens": cumulative(lengths, device),
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
        Case(case_name("ragged", dtype), _perceiver((130, 0, 1), 3, 4, 2), dtype)
        for dtype in DTYPES
    ]
    cases += [
        Case(case_name("patches", T), _perceiver((T,), 3, 2, 1, 72), torch.bfloat16)
        for T in (63, 64, 65, 200)
    ]
    cases += [
        Case(case_name("latents", L), _perceiver((70,), L, 4, 2, 16))
        for L in (1, 31, 32, 33, 64, 65)
    ]
    cases += [
        Case(case_name("groups", H, H_KV), _perceiver((70, 30), 5, H, H_KV, 16))
        for H, H_KV in ((3, 3), (3, 1), (8, 1))
    ]
    cases += [
        Case(case_name("head-dim", D), _perceiver((70,), 5, 2, 1, D))
        for D in (8, 40, 128, 160, 256)
    ]
    cases += [
        Case(case_name(layout), _perceiver((70, 30), 5, 2, 2, layout=layout)) for layout in LAYOUTS
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
    """Return the product of lengths, latents and heads.

    Sizes are run-time arguments, so these cases compile few kernels.
    """
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
            case_name("gpu", *packed[:5], L, H, H_KV, D),
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
            case_name("gpu-head-dim", D, dtype, L),
            _perceiver((200, 1, 323), L, 4, 2, D),
            dtype,
            "gpu",
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
            case_name("gpu-heads", H, H_KV, layout),
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


PERCEIVER_ATTENTION = KernelSpec(
    name="perceiver_attention",
    make_inputs=_perceiver_inputs,
    cases=_perceiver_cases(),
    cost=_perceiver_cost,
    implementations={"triton": perceiver_attention.perceiver_attention},
)
