"""Rows of the catalog: activations."""

from itertools import product

import torch

from idefics2_kernels import activation
from idefics2_kernels.catalog.layouts import LAYOUTS, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SIZES = ((1, 1), (1, 64), (5, 123), (3, 513), (7, 31), (0, 64))
_GPU_SIZES = ((1, 14336), (257, 1151), (1023, 4097), (131, 997), (64, 8192), (4, 511), (5, 512))


_TEXT_ROWS = {"8192": 8192, "decode-b1": 1, "decode-b64": 64}
_VISION_ROWS = {"8192": 8192, "39200": 39200}  # the second is eight images of 4,900 patches


def _cases(model_n: int, rows: dict[str, int]) -> tuple[Case, ...]:
    """Give cases by the shape of the output."""
    cases = [
        Case(f"{M}x{N}-{dtype}".replace("torch.", ""), {"shape": (M, N)}, dtype)
        for (M, N), dtype in product(_SIZES, (torch.float32, torch.bfloat16))
    ]
    cases += [
        Case(layout, {"shape": (3, 5, 72), "layout": layout}, torch.float16) for layout in LAYOUTS
    ]
    cases += [
        Case(f"{name}-{dtype}".replace("torch.", ""), {"shape": (3, 96), "scale": scale}, dtype)
        for (name, scale), dtype in product((("tiny", 1e-4), ("large", 100.0)), _FLOATS[:2])
    ]
    cases += [
        Case(f"gpu-{M}x{N}-{dtype}".replace("torch.", ""), {"shape": (M, N)}, dtype, "gpu")
        for (M, N), dtype in product(_GPU_SIZES, _FLOATS)
    ]
    cases += [
        Case(
            f"gpu-{layout}-{dtype}".replace("torch.", ""),
            {"shape": (6, 37, 1031), "layout": layout},
            dtype,
            "gpu",
        )
        for layout, dtype in product(LAYOUTS, _FLOATS)
    ]
    cases += [Case("gpu-far", {"shape": (3, 1151), "layout": "far"}, where="huge")]
    cases += [
        Case(name, {"shape": (M, model_n)}, torch.bfloat16, "model") for name, M in rows.items()
    ]
    return tuple(cases)


def _drawn(case: Case, device: torch.device, halves: int) -> torch.Tensor:
    *lead, N = case.dims["shape"]
    return normal(
        *lead,
        halves * N,
        dtype=case.dtype,
        device=device,
        layout=case.dims.get("layout", "plain"),
        scale=case.dims.get("scale", 3.0),
    )


def _silu_mul_inputs(case: Case, device: torch.device) -> Inputs:
    return {"gate_up": _drawn(case, device, halves=2)}


def _gelu_tanh_inputs(case: Case, device: torch.device) -> Inputs:
    N = case.dims["shape"][-1]
    has_bias = N not in (31, 997)  # two of the sizes have none
    bias = normal(N, dtype=case.dtype, device=device) if has_bias else None
    return {"x": _drawn(case, device, halves=1), "bias": bias}


def _cost(case: Case, passes: int, vectors: int, flops: int) -> Cost:
    elements, N = torch.Size(case.dims["shape"]).numel(), case.dims["shape"][-1]
    return Cost(
        bytes=(passes * elements + vectors * N) * case.dtype.itemsize, flops=flops * elements
    )


ACTIVATIONS = (
    KernelSpec(
        name="silu_mul",
        make_inputs=_silu_mul_inputs,
        cases=_cases(14336, _TEXT_ROWS),
        cost=lambda case: _cost(case, passes=3, vectors=0, flops=5),
        implementations={"triton": activation.silu_mul},
    ),
    KernelSpec(
        name="gelu_tanh",
        make_inputs=_gelu_tanh_inputs,
        cases=_cases(4304, _VISION_ROWS),
        cost=lambda case: _cost(case, passes=2, vectors=1, flops=9),
        implementations={"triton": activation.gelu_tanh},
    ),
)
