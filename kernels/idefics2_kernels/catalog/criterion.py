"""The criterion for a correct kernel, used by the parity tests and the benchmark."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from idefics2_kernels.catalog.spec import Case, Inputs, KernelSpec, copy_inputs, widen_inputs

# The error allowed, as a multiple of PyTorch's error in the same dtype.
RATIO = 2.0


def worst_error(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, terms: Tensor | None = None
) -> float:
    """Return the largest error of a row as a share of the error allowed: at most 1 is correct.

    A row is the last axis. The error max|actual - exact| of a row may be at most
    ``RATIO`` * (max|same_dtype - exact| + eps * max|exact|). Here ``exact`` is the reference in
    float64, and ``same_dtype`` is the reference in the kernel's dtype. A bound on the whole tensor
    would not notice one missing tile of keys among thousands. NaN anywhere gives infinity.

    ``terms`` are the sums of the absolute values of the terms of ``exact``. A row may be wrong by
    the rounding of such a sum in fp32 as well: 1.2e-7 * max|terms| is added to the bracket. In a
    row whose terms cancel nothing else is left.
    """
    if not actual.numel():
        return 0.0
    if actual.isnan().any():
        return float("inf")
    floor = torch.finfo(actual.dtype).eps * exact.abs().amax(-1)
    if terms is not None:
        floor = floor + torch.finfo(torch.float32).eps * terms.amax(-1)
    budget = RATIO * ((same_dtype - exact).abs().amax(-1) + floor)
    error = (actual - exact).abs().amax(-1)
    # A row without error needs no budget, and that of a row of zeros is 0.
    return torch.where(error > 0, error / budget.clamp(min=1e-300), 0.0).max().item()


def case_error(
    spec: KernelSpec,
    implementation: str,
    case: Case,
    inputs: Inputs,
    during: AbstractContextManager[object] | None = None,
) -> float:
    """Run an implementation on a copy of ``inputs`` and return its ``worst_error``.

    The call is made inside the context ``during``, if given. The error is infinite for another
    dtype or shape than the reference's, and for any difference in an operation that must be exact.
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
    wide = widen_inputs(inputs)
    exact = spec.expected(wide, checked)
    terms: tuple[Tensor | None, ...] = (None,) * len(exact)
    if spec.terms is not None:
        terms = spec.terms(**wide, **({} if checked is None else {"rows": checked}))
    return max(worst_error(*each) for each in zip(actual, same_dtype, exact, terms, strict=True))
