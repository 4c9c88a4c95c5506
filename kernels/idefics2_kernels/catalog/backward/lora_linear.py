"""Row of the catalog: gradients of the product with a low-rank product beside it."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.backward.lora_linear import lora_linear_backward
from idefics2_kernels.catalog.layouts import normal
from idefics2_kernels.catalog.lora_linear import LORA_LINEAR
from idefics2_kernels.catalog.products import nf4_bytes
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.gradients import REFERENCE_GRADIENTS

# (N, K) of the products of a layer of the 8B model, and the ranks beside them of an adapter of
# rank 8.
_LAYER = {(28672, 4096): 16, (4096, 14336): 16, (6144, 4096): 32}


def _cases() -> tuple[Case, ...]:
    small = [case for case in LORA_LINEAR.cases if case.where == "any"]
    gpu = [case for case in LORA_LINEAR.cases if case.where == "gpu"]
    cases = small + gpu[::2]
    for M, ((N, K), R) in product((512, 4096), _LAYER.items()):
        dims: dict[str, Any] = {"M": M, "N": N, "K": K, "R": R, "nf4": True, "bias": False}
        cases.append(Case(f"{N}x{K}-r{R}-m{M}", dims, torch.bfloat16, "model"))
    dims = {"M": 5, "N": 20, "K": 64, "R": 8, "nf4": True, "bias": False, "frozen": True}
    return (*cases, Case("frozen", dims), Case("frozen-dense", {**dims, "nf4": False}))


def _inputs(case: Case, device: torch.device) -> Inputs:
    inputs = LORA_LINEAR.make_inputs(case, device)
    del inputs["bias"]
    layout = case.dims.get("layout", "plain")
    lead = inputs["x"].shape[:-1]
    dy = normal(*lead, case.dims["N"], dtype=case.dtype, device=device, layout=layout)
    trains = not case.dims.get("frozen")
    if not trains:
        inputs["x"] = None
    return {"dy": dy, **inputs, "pair_grad": trains}


def _wanted(_inputs: Inputs, result: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient for gradient in result if gradient is not None)


def _cost(case: Case) -> Cost:
    M, N, K, R = case.dims.get("B", 1) * case.dims["M"], *(case.dims[name] for name in "NKR")
    trains = not case.dims.get("frozen")
    numbers = M * (N + K) + R * (N + K) + trains * (M * K + R * (N + K))
    base = nf4_bytes(N * K) if case.dims["nf4"] else N * K * case.dtype.itemsize
    # dx and dy @ b; then x @ a.T and the gradients of a and b.
    flops = 2 * M * (N * K + R * (N + K)) + trains * 2 * M * R * (N + 2 * K)
    return Cost(bytes=numbers * case.dtype.itemsize + base, flops=flops)


LORA_LINEAR_GRADIENT = KernelSpec(
    name="lora_linear_backward",
    make_inputs=_inputs,
    cases=_cases(),
    cost=_cost,
    implementations={"triton": lora_linear_backward},
    outputs=_wanted,
    reference=REFERENCE_GRADIENTS.lora_linear,
)
