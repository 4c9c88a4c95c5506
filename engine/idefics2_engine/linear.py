"""Linear layers, called through ``Ops``: dense, in NF4, and several side by side."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from idefics2_kernels import NF4Weight, Ops


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

    def gelu(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to the tanh form of GELU of what ``forward`` gives (..., N)."""
        return self.ops.linear_gelu(x, self.weight, self.bias)


class NF4Linear(nn.Module):
    """Product with a weight (N, K) in NF4 and an optional ``bias`` (N,).

    The weight is no parameter: it has no gradient and is not in ``state_dict``. ``to`` moves it, and leaves its types alone.
    """

    def __init__(self, K: int, N: int, ops: Ops, *, bias: bool) -> None:
        super().__init__()
        self.shape = (N, K)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None
        self.ops = ops
        self._weight: NF4Weight | None = None

    @property
    def weight(self) -> NF4Weight:
        """The weight; ``RuntimeError`` before it is set."""
        if self._weight is None:
            raise RuntimeError(f"the NF4 weight of shape {self.shape} was not loaded")
        return self._weight

    @weight.setter
    def weight(self, weight: NF4Weight) -> None:
        if weight.shape != self.shape:
            raise ValueError(f"weight must have shape {self.shape}, got {weight.shape}")
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to (..., N)."""
        return self.ops.nf4_matmul(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to the tanh form of GELU of what ``forward`` gives (..., N)."""
        return self.ops.gelu_tanh(self(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._weight is not None:
            self._weight = self._weight.to(fn(self._weight.codes).device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class SideBySide(nn.Module):
    """Linear layers of one input whose outputs lie side by side, in place of one layer with their rows stacked."""

    def __init__(self, layers: Sequence[Linear | NF4Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to (..., N), N being the sum of the layers' own."""
        layers = cast(Sequence[nn.Module], self.layers)
        return torch.cat([layer(x) for layer in layers], dim=-1)
