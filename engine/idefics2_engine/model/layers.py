"""Layers shared by several parts of the model: norms and the gated MLP."""

import torch
from torch import Tensor, nn

from idefics2_engine.model.linear import Linear
from idefics2_kernels import Ops


class LayerNorm(nn.Module):
    """Layer normalization: mean 0 and variance 1 over the hidden axis, then scale and shift."""

    def __init__(self, hidden: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.eps = eps
        self.ops = ops

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``x`` to ``residual`` (..., hidden): the sum normalized, and the sum."""
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMS normalization: root mean square 1 over the hidden axis, then scale."""

    def __init__(self, hidden: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (..., hidden)."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``x`` to ``residual`` (..., hidden): the sum normalized, and the sum."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class GatedMLP(nn.Module):
    """A gated MLP, down(silu(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, hidden: int, intermediate: int, out: int, ops: Ops) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * intermediate, ops, bias=False)
        self.down_proj = Linear(intermediate, out, ops, bias=False)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., hidden) to (..., out)."""
        out: Tensor = self.down_proj(self.ops.silu_mul(self.gate_up_proj(x)))
        return out
