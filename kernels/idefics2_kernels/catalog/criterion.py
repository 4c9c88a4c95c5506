"""When a kernel is right: the one criterion of parity tests and benchmark."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from idefics2_kernels.catalog.spec import Case, Inputs, KernelSpec, copy_inputs, widen_inputs

RATIO = 2.0  # times the error of PyTorch in the same dtype


def worst_error(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> float:
    """Return the largest error of a row as a share of what is allowed there: right is at most 1.

    A row is all of the last axis. max|actual - exact| may be ``RATIO`` * (max|same_dtype - exact| +
    eps * max|exact|), where ``exact`` is the reference in float64 and ``same_dtype`` the reference
    in the kernel's dtype. Over the whole tensor one lost key tile of thousands would pass. NaN
    anywhere gives infinity.
    """
    if not actual.numel():
        return 0.0
    if actual.isnan().any():
        return float("inf")
    floor = torch.finfo(actual.dtype).eps * exact.abs().amax(-1)
    budget = RATIO * ((same_dtype - exact).abs().amax(-1) + floor)
    error = (actual - exact).abs().amax(-1)
    # an exact zero has no budget and needs none
    return torch.where(error > 0, error / budget.clamp(min=1e-300), 0.0).max().item()


def case_error(
    spec: KernelSpec,
    implementation: str,
    case: Case,
    inputs: Inputs,
    during: AbstractContextManager[object] | None = None,
) -> float:
    """Run an implementation on a copy of ``inputs``, in a context if given.

    Return its worst row's share of the allowed.

    An inexact copy, another dtype or another shape is infinitely wrong.
    """
    checked = spec.checked_rows(case, inputs)
    same_dtype = spec.expected(copy_inputs(inputs), checked)
    with during or nullcontext():
        actual = spec.run(spec.implementations[implementation], copy_inputs(inputs))
    if checked is not None:
        actual = tuple(output[checked] for output in actual)
    for ours, theirs in zip(actual, same_dtype, strict=True):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return float("inf")
    if spec.exact:
        equal = all(torch.equal(*pair) for pair in zip(actual, same_dtype, strict=True))
        return 0.0 if equal else float("inf")
    exact = spec.expected(widen_inputs(inputs), checked)
    return max(worst_error(*each) for each in zip(actual, same_dtype, exact, strict=True))
