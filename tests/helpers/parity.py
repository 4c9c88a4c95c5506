"""The check of a kernel on one case, for the parity tests and for the mutants."""

import torch

from guarded import guarded_allocations
from idefics2_kernels.catalog import Case, KernelSpec
from idefics2_kernels.catalog.criterion import case_error


def check(spec: KernelSpec, implementation: str, case: Case, device: torch.device) -> None:
    """Compare an implementation with float64, row by row, in memory that is full of NaN."""
    inputs = spec.make_inputs(case, device)
    worst = case_error(spec, implementation, case, inputs, guarded_allocations())
    assert worst <= 1, f"{worst:.2f} times the allowed error"
