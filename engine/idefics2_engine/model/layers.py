"""Layer norm and root-mean-square norm, called through ``Ops``; each can add a residual first."""

import torch
from torch import Tensor, nn

from idefics2_kernels import Ops


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the hidden axis, then scale and shift."""

    def __init__(self, hidden: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.eps = eps
        self.ops = ops

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``x`` to ``residual`` (..., hidden): the sum normalised, and the sum."""
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square 1 over the hidden axis, then scale."""

    def __init__(self, hidden: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., hidden)."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``x`` to ``residual`` (..., hidden): the sum normalised, and the sum."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
