"""Row of the catalog: the gradient of rotary positions."""

import torch

from idefics2_kernels.backward import rotary
from idefics2_kernels.catalog.rotary import rotary_cases, rotary_cost, rotary_inputs
from idefics2_kernels.catalog.spec import Case, Inputs, KernelSpec
from idefics2_kernels.gradients import REFERENCE_GRADIENTS


def _inputs(case: Case, device: torch.device) -> Inputs:
    inputs = rotary_inputs(case, device)
    return {"dq": inputs.pop("q"), "dk": inputs.pop("k"), **inputs}


ROTARY_GRADIENT = KernelSpec(
    name="rotary_backward",
    make_inputs=_inputs,
    cases=tuple(case for case in rotary_cases() if not case.name.startswith("decode")),
    cost=lambda case: rotary_cost(case, copied_heads=0),
    implementations={"triton": rotary.rotary_backward},
    reference=REFERENCE_GRADIENTS.rotary,
)
