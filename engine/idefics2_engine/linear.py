"""The dense linear layer, called through ``Ops``."""

import torch
from torch import Tensor, nn

from idefics2_kernels import Ops


class Linear(nn.Module):
    """Product with ``weight`` (N, K) and an optional ``bias`` (N,)."""

    def __init__(self, K: int, N: int, ops: Ops, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to (..., N)."""
        return self.ops.linear(x, self.weight, self.bias)
