"""Rows of the catalog: gradients of norms."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.backward import layer_norm, rms_norm
from idefics2_kernels.catalog.layouts import Layout, normal
from idefics2_kernels.catalog.norms import layer_norm_inputs, norm_cases, rms_norm_inputs
from idefics2_kernels.catalog.rowwise import rowwise_cost
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.gradients import REFERENCE_GRADIENTS


def _cases(model_n: int, M: int) -> tuple[Case, ...]:
    """Return the norm's cases, with and without a further gradient and the weight's."""
    cases = [
        replace(case, dims={**case.dims, "sum": i % 2 == 0, "weight_grad": i % 3 > 0})
        for i, case in enumerate(norm_cases(model_n, {}))
    ]
    # More rows than programs that sum the weight's gradient.
    many = {"sum": True, "weight_grad": True}
    cases += [
        Case("many-rows", {"shape": (600, 515), **many}, torch.float32),
        Case("view", {"shape": (3, 5, 72), "layout": "sliced", **many}, torch.float16),
        Case("gpu-many-rows", {"shape": (8192, 321), **many}, torch.bfloat16, "gpu"),
    ]
    model = {"shape": (M, model_n), "sum": True}
    return (
        *cases,
        Case(str(M), {**model, "weight_grad": False}, torch.bfloat16, "model"),
        Case(f"{M}-weight", {**model, "weight_grad": True}, torch.bfloat16, "model"),
    )


def _with_gradients(case: Case, inputs: Inputs) -> Inputs:
    x = inputs["x"]

    # A view is that of x and dy alone, so that the strides of all three differ.
    layout: Layout = "plain" if case.where == "huge" else case.dims.get("layout", "plain")
    dsum = None
    if case.dims["sum"]:
        dsum = normal(*x.shape, dtype=x.dtype, device=x.device)
    dy = normal(*x.shape, dtype=x.dtype, device=x.device, layout=layout)
    return {"dy": dy, **inputs, "dsum": dsum, "weight_grad": case.dims["weight_grad"]}


def _wanted(_inputs: Inputs, result: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient for gradient in result if gradient is not None)


def _cost(case: Case, trained: int, flops: int) -> Cost:
    """Return the cost of a gradient that also gives those of ``trained`` vectors, if wanted."""
    vectors = 1 + trained * case.dims["weight_grad"]
    return rowwise_cost(case, passes=3 + case.dims["sum"], vectors=vectors, flops=flops)


def _spec(name: str, make_inputs: Any, cases: tuple[Case, ...], **options: Any) -> KernelSpec:
    return KernelSpec(
        name=f"{name}_backward",
        make_inputs=lambda case, device: _with_gradients(case, make_inputs(case, device)),
        cases=cases,
        outputs=_wanted,
        reference=getattr(REFERENCE_GRADIENTS, name),
        **options,
    )


NORM_GRADIENTS = (
    _spec(
        "rms_norm",
        rms_norm_inputs,
        _cases(4096, 8192),
        cost=lambda case: _cost(case, trained=1, flops=10),
        implementations={"triton": rms_norm.rms_norm_backward},
    ),
    _spec(
        "layer_norm",
        layer_norm_inputs,
        _cases(1152, 39200),
        cost=lambda case: _cost(case, trained=2, flops=14),
        implementations={"triton": layer_norm.layer_norm_backward},
    ),
)
