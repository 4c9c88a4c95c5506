"""The dtype in which the reference computes."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
