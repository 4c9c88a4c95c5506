"""Rows of the catalog: norms."""

from itertools import product

import torch

from idefics2_kernels.catalog.layouts import LAYOUTS, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.norms import layer_norm, rms_norm

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SIZES = ((1, 1), (1, 64), (5, 123), (3, 127), (17, 129), (7, 31), (0, 64), (4, 1152))
_GPU_SIZES = ((1, 4096), (257, 1151), (1023, 4097), (131, 997), (64, 8192))


_TEXT_ROWS = {"8192": 8192, "decode-b1": 1, "decode-b64": 64}
_VISION_ROWS = {"8192": 8192, "39200": 39200}  # the second is eight images of 4,900 patches


def _cases(model_n: int, rows: dict[str, int]) -> tuple[Case, ...]:
    cases = [
        Case(f"{M}x{N}-{dtype}".replace("torch.", ""), {"shape": (M, N)}, dtype)
        for (M, N), dtype in product(_SIZES, (torch.float32, torch.bfloat16))
    ]
    cases += [
        Case(layout, {"shape": (3, 5, 72), "layout": layout}, torch.float16) for layout in LAYOUTS
    ]
    cases += [
        Case("tiny", {"shape": (3, 96), "scale": 1e-4}),
        Case("large", {"shape": (3, 96), "scale": 100.0}),
        Case("far-from-zero", {"shape": (3, 96), "shift": 30.0}, torch.float32),
    ]
    cases += [
        Case(f"gpu-{M}x{N}-{dtype}".replace("torch.", ""), {"shape": (M, N)}, dtype, "gpu")
        for (M, N), dtype in product(_GPU_SIZES, _FLOATS)
    ]
    cases += [
        Case(
            f"gpu-{layout}-{dtype}".replace("torch.", ""),
            {"shape": (5, 37, 1151), "layout": layout},
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


def _rms_norm_inputs(case: Case, device: torch.device) -> Inputs:
    shape, dims = case.dims["shape"], case.dims
    x = normal(
        *shape,
        dtype=case.dtype,
        device=device,
        layout=dims.get("layout", "plain"),
        scale=dims.get("scale", 1.0),
    )
    x += dims.get("shift", 0.0)
    return {
        "x": x,
        "weight": 1 + normal(shape[-1], dtype=case.dtype, device=device, scale=0.1),
        "eps": 1e-5,
    }


def _layer_norm_inputs(case: Case, device: torch.device) -> Inputs:
    bias = normal(case.dims["shape"][-1], dtype=case.dtype, device=device)
    return {**_rms_norm_inputs(case, device), "bias": bias}


def _with_residual(inputs: Inputs) -> Inputs:
    x = inputs["x"]
    return {**inputs, "residual": normal(*x.shape, dtype=x.dtype, device=x.device)}


def _cost(case: Case, passes: int, vectors: int, flops: int) -> Cost:
    elements, N = torch.Size(case.dims["shape"]).numel(), case.dims["shape"][-1]
    return Cost(
        bytes=(passes * elements + vectors * N) * case.dtype.itemsize, flops=flops * elements
    )


NORMS = (
    KernelSpec(
        name="rms_norm",
        make_inputs=_rms_norm_inputs,
        cases=_cases(4096, _TEXT_ROWS),
        cost=lambda case: _cost(case, passes=2, vectors=1, flops=4),
        implementations={"triton": rms_norm.rms_norm},
    ),
    KernelSpec(
        name="add_rms_norm",
        make_inputs=lambda case, device: _with_residual(_rms_norm_inputs(case, device)),
        cases=_cases(4096, _TEXT_ROWS),
        cost=lambda case: _cost(case, passes=4, vectors=1, flops=5),
        implementations={"triton": rms_norm.add_rms_norm},
    ),
    KernelSpec(
        name="layer_norm",
        make_inputs=_layer_norm_inputs,
        cases=_cases(1152, _VISION_ROWS),
        cost=lambda case: _cost(case, passes=2, vectors=2, flops=7),
        implementations={"triton": layer_norm.layer_norm},
    ),
    KernelSpec(
        name="add_layer_norm",
        make_inputs=lambda case, device: _with_residual(_layer_norm_inputs(case, device)),
        cases=_cases(1152, _VISION_ROWS),
        cost=lambda case: _cost(case, passes=4, vectors=2, flops=8),
        implementations={"triton": layer_norm.add_layer_norm},
    ),
)
