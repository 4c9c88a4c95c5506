"""Rows of the catalog: gradients of activations."""

import torch
from torch import Tensor

from idefics2_kernels.backward import activation
from idefics2_kernels.catalog.activation import (
    activation_cases,
    gelu_tanh_inputs,
    silu_mul_inputs,
)
from idefics2_kernels.catalog.layouts import normal
from idefics2_kernels.catalog.rowwise import rowwise_cost
from idefics2_kernels.catalog.spec import Case, Inputs, KernelSpec
from idefics2_kernels.gradients import REFERENCE_GRADIENTS


def _cases(model_n: int, M: int) -> tuple[Case, ...]:
    huge = Case("huge-values", {"shape": (3, 96), "scale": 1e18}, torch.bfloat16)
    return (*activation_cases(model_n, {str(M): M}), huge)


def _dy(case: Case, device: torch.device) -> Tensor:
    return normal(*case.dims["shape"], dtype=case.dtype, device=device)


def _silu_mul_inputs(case: Case, device: torch.device) -> Inputs:
    return {"dy": _dy(case, device), **silu_mul_inputs(case, device)}


def _gelu_tanh_inputs(case: Case, device: torch.device) -> Inputs:
    return {"dy": _dy(case, device), **gelu_tanh_inputs(case, device)}


ACTIVATION_GRADIENTS = (
    KernelSpec(
        name="silu_mul_backward",
        make_inputs=_silu_mul_inputs,
        cases=_cases(14336, 8192),
        cost=lambda case: rowwise_cost(case, passes=5, vectors=0, flops=11),
        implementations={"triton": activation.silu_mul_backward},
        reference=REFERENCE_GRADIENTS.silu_mul,
    ),
    KernelSpec(
        name="gelu_tanh_backward",
        make_inputs=_gelu_tanh_inputs,
        cases=_cases(4304, 39200),
        cost=lambda case: rowwise_cost(case, passes=3, vectors=1, flops=16),
        implementations={"triton": activation.gelu_tanh_backward},
        reference=REFERENCE_GRADIENTS.gelu_tanh,
    ),
)
