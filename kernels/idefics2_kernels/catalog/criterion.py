"""When a kernel is right: the one criterion of parity tests and benchmark."""

import torch
from torch import Tensor

RATIO = 2.0  # times the error of PyTorch in the same dtype


def worst_error(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> float:
    """Return the largest error of a row as a share of what is allowed there: right is at most 1.

    A row is all of the last axis. max|actual - exact| may be ``RATIO`` * (max|same_dtype - exact| + eps * max|exact|),
    where ``exact`` is the reference in float64 and ``same_dtype`` the reference in the kernel's dtype. Over the whole
    tensor one lost key tile of thousands would pass. NaN anywhere gives infinity.
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
