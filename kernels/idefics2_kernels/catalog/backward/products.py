"""Rows of the catalog: gradients of products."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.backward import products
from idefics2_kernels.catalog.layouts import normal
from idefics2_kernels.catalog.products import (
    linear_inputs,
    nf4_bytes,
    nf4_matmul_inputs,
    product_cases,
)
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.gradients import REFERENCE_GRADIENTS

_WEIGHTS = ((28672, 4096), (4096, 14336), (6144, 4096))


def _cases(rows: tuple[int, ...]) -> tuple[Case, ...]:
    """Return the product's cases, and the model's with so many ``rows``."""
    # The interpreter takes long to dequantize a large weight.
    small = [c for c in product_cases() if c.where == "any" and c.dims["N"] * c.dims["K"] <= 8000]
    gpu = [case for case in product_cases() if case.where == "gpu"]
    cases = small + gpu[::4]
    for M, (N, K) in product(rows, _WEIGHTS):
        dims: dict[str, Any] = {"M": M, "N": N, "K": K, "bias": False}
        cases.append(Case(f"{N}x{K}-m{M}", dims, torch.bfloat16, "model"))
    return tuple(cases)


def _linear_cases() -> tuple[Case, ...]:
    """Return the cases of a dense product, and of sums of rows in several parts and in a view."""
    return (
        *_cases((512, 4096)),
        Case("many-rows", {"M": 4200, "N": 3, "K": 2, "bias": True}, torch.float32),
        Case("view", {"M": 70, "N": 40, "K": 2, "bias": True, "layout": "sliced"}, torch.float32),
    )


def _dy(case: Case, device: torch.device) -> Tensor:
    M, N = case.dims["M"], case.dims["N"]
    lead = (case.dims["B"], M) if "B" in case.dims else (M,)
    layout = case.dims.get("layout", "plain")
    return normal(*lead, N, dtype=case.dtype, device=device, layout=layout)


def _linear_inputs(case: Case, device: torch.device) -> Inputs:
    inputs = linear_inputs(case, device)
    # A bias trains where the weight does, in the model.
    trained = {"weight_grad": case.where != "model" or case.dims["M"] > 512}
    trained["bias_grad"] = inputs.pop("bias") is not None
    if not trained["weight_grad"]:
        inputs["x"] = None
    return {"dy": _dy(case, device), **inputs, **trained}


def _nf4_matmul_inputs(case: Case, device: torch.device) -> Inputs:
    return {"dy": _dy(case, device), "weight": nf4_matmul_inputs(case, device)["weight"]}


def _wanted(_inputs: Inputs, result: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient for gradient in result if gradient is not None)


def _linear_cost(case: Case) -> Cost:
    M, N, K = case.dims.get("B", 1) * case.dims["M"], case.dims["N"], case.dims["K"]
    trains = case.where != "model" or M > 512
    elements = M * (N + K) + N * K + trains * (M * K + N * K) + case.dims["bias"] * N
    return Cost(bytes=elements * case.dtype.itemsize, flops=(1 + trains) * 2 * M * N * K)


def _nf4_matmul_cost(case: Case) -> Cost:
    M, N, K = case.dims.get("B", 1) * case.dims["M"], case.dims["N"], case.dims["K"]
    return Cost(bytes=M * (N + K) * case.dtype.itemsize + nf4_bytes(N * K), flops=2 * M * N * K)


PRODUCT_GRADIENTS = (
    KernelSpec(
        name="linear_backward",
        make_inputs=_linear_inputs,
        cases=_linear_cases(),
        cost=_linear_cost,
        implementations={"triton": products.linear_backward},
        outputs=_wanted,
        reference=REFERENCE_GRADIENTS.linear,
    ),
    KernelSpec(
        name="nf4_matmul_backward",
        make_inputs=_nf4_matmul_inputs,
        cases=_cases((512, 2048, 4096)),
        cost=_nf4_matmul_cost,
        implementations={"triton": products.nf4_matmul_backward},
        reference=REFERENCE_GRADIENTS.nf4_matmul,
    ),
)
