"""Rows of the catalog: norms."""

from itertools import product

import torch

from idefics2_kernels import rms_norm
from idefics2_kernels.catalog.layouts import LAYOUTS, Layout, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec

_HALF = (torch.float16, torch.bfloat16)
_SIZES = ((1, 1), (1, 64), (5, 123), (3, 127), (2, 129), (7, 31), (0, 64), (4, 1152))


def _cases() -> tuple[Case, ...]:
    cases = [
        Case(f"{M}x{N}-{dtype}".replace("torch.", ""), {"M": M, "N": N}, dtype)
        for (M, N), dtype in product(_SIZES, (torch.float32, *_HALF))
    ]
    layouts: tuple[Layout, ...] = tuple(layout for layout in LAYOUTS if layout != "transposed")
    cases += [
        Case(f"{layout}-{dtype}".replace("torch.", ""), {"M": 5, "N": 72, "layout": layout}, dtype)
        for layout, dtype in product(layouts, _HALF)
    ]
    cases += [
        Case("tiny", {"M": 3, "N": 96, "scale": 1e-4}),
        Case("large", {"M": 3, "N": 96, "scale": 100.0}),
    ]
    cases += [
        Case(f"gpu-{M}x{N}-{dtype}".replace("torch.", ""), {"M": M, "N": N}, dtype, "gpu")
        for (M, N), dtype in product(
            ((1, 4096), (257, 1151), (1023, 4097), (131, 997), (64, 8192)), (torch.float32, *_HALF)
        )
    ]
    cases += [
        Case(name, {"M": M, "N": N}, torch.bfloat16, "model")
        for name, M, N in (("8192", 8192, 4096), ("decode-b1", 1, 4096), ("decode-b64", 64, 4096))
    ]
    return tuple(cases)


def _rms_norm_inputs(case: Case, device: torch.device) -> Inputs:
    M, N = case.dims["M"], case.dims["N"]
    layout = case.dims.get("layout", "plain")
    x = normal(
        M, N, dtype=case.dtype, device=device, layout=layout, scale=case.dims.get("scale", 1.0)
    )
    return {
        "x": x,
        "weight": 1 + normal(N, dtype=case.dtype, device=device, scale=0.1),
        "eps": 1e-5,
    }


def _add_rms_norm_inputs(case: Case, device: torch.device) -> Inputs:
    inputs = _rms_norm_inputs(case, device)
    residual = normal(*inputs["x"].shape, dtype=case.dtype, device=device)
    return {**inputs, "residual": residual}


def _cost(case: Case, passes: int) -> Cost:
    elements = case.dims["M"] * case.dims["N"]
    return Cost(bytes=passes * elements * case.dtype.itemsize, flops=4 * elements)


NORMS = (
    KernelSpec(
        name="rms_norm",
        make_inputs=_rms_norm_inputs,
        cases=_cases(),
        cost=lambda case: _cost(case, 2),
        implementations={"triton": rms_norm.rms_norm},
    ),
    KernelSpec(
        name="add_rms_norm",
        make_inputs=_add_rms_norm_inputs,
        cases=_cases(),
        cost=lambda case: _cost(case, 4),
        implementations={"triton": rms_norm.add_rms_norm},
    ),
)
