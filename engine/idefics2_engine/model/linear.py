"""Linear layers: dense, in NF4, and several with a common input side by side."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from idefics2_engine.model.low_rank import LowRank
from idefics2_kernels import NF4Weight, Ops
from idefics2_kernels.nf4.nf4_weight import can_stack, split, stack


class Linear(nn.Module):
    """A dense linear layer with ``weight`` (N, K) and an optional ``bias`` (N,).

    ``low_rank`` is a change that is computed beside the weight, or ``None``.
    """

    def __init__(self, K: int, N: int, ops: Ops, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None
        self.low_rank: LowRank | None = None
        self.ops = ops

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, K) of the weight."""
        N, K = self.weight.shape
        return N, K

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to (..., N)."""
        return _multiply(self.ops, x, self.weight, self.bias, _factors(self.low_rank))

    def gelu(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to the tanh form of GELU of what ``forward`` gives (..., N)."""
        if self.low_rank is not None:
            return self.ops.gelu_tanh(self(x))
        return self.ops.linear_gelu(x, self.weight, self.bias)


class NF4Linear(nn.Module):
    """A linear layer with a weight (N, K) in NF4 and an optional ``bias`` (N,).

    The weight is not a parameter: it has no gradient and is not in ``state_dict``. ``to`` moves it
    to another device but does not convert its dtypes. ``low_rank`` is a change that is computed
    beside the weight, or ``None``.
    """

    def __init__(self, K: int, N: int, ops: Ops, *, bias: bool) -> None:
        super().__init__()
        self.shape = (N, K)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None
        self.low_rank: LowRank | None = None
        self.ops = ops
        self._weight: NF4Weight | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the weight has been set."""
        return self._weight is not None

    @property
    def weight(self) -> NF4Weight:
        """The weight; raises ``RuntimeError`` before it is set."""
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
        return _multiply(self.ops, x, self.weight, self.bias, _factors(self.low_rank))

    def gelu(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to the tanh form of GELU of what ``forward`` gives (..., N)."""
        return self.ops.gelu_tanh(self(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._weight is not None:
            self._weight = self._weight.to(fn(self._weight.codes).device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class SideBySide(nn.Module):
    """Several linear layers with a common input, whose outputs are concatenated.

    ``stack`` joins NF4 weights into one, of which the layers' weights become views. The layers are
    then computed as one product. ``low_rank`` is a change of all rows together that is computed
    beside the weights, or ``None``; the layers have none of their own.
    """

    def __init__(self, layers: Sequence[Linear | NF4Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.low_rank: LowRank | None = None
        self._stacked: NF4Weight | None = None
        # The views that were assigned to the layers when they were stacked
        self._parts: list[NF4Weight] = []

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, K) of the weights together."""
        shapes = [layer.shape for layer in cast(Sequence[Linear | NF4Linear], self.layers)]
        return sum(N for N, _ in shapes), shapes[0][1]

    def stack(self) -> None:
        """Stack the layers' weights if all are loaded and compatible."""
        layers = [l for l in self.layers if isinstance(l, NF4Linear) and l.is_loaded]
        if len(layers) == len(self.layers) and can_stack([layer.weight for layer in layers]):
            self._share(stack([layer.weight for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to (..., N), where N is the sum of the layers' widths."""
        layers = cast(Sequence[Linear | NF4Linear], self.layers)
        if self._stacked is None or not self._is_shared:
            return torch.cat(self._apart(x, layers), dim=-1)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        return _multiply(layers[0].ops, x, self._stacked, bias, _factors(self.low_rank))

    def _apart(self, x: Tensor, layers: Sequence[Linear | NF4Linear]) -> list[Tensor]:
        """Return the output of each layer."""
        if self.low_rank is None:
            return [layer(x) for layer in layers]
        outs, first = [], 0
        for layer in layers:
            factors = self.low_rank.of_rows(first, layer.shape[0])
            outs.append(_multiply(layer.ops, x, layer.weight, layer.bias, factors))
            first += layer.shape[0]
        return outs

    @property
    def _is_shared(self) -> bool:
        """Whether every layer still has the weight from stacking."""
        layers = cast(Sequence[NF4Linear], self.layers)
        return all(l.weight is part for l, part in zip(layers, self._parts, strict=True))

    def _share(self, stacked: NF4Weight) -> None:
        layers = cast(Sequence[NF4Linear], self.layers)
        self._stacked = stacked
        self._parts = split(stacked, [layer.shape[0] for layer in layers])
        for layer, part in zip(layers, self._parts, strict=True):
            layer.weight = part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stacked = self._stacked if self._stacked is not None and self._is_shared else None
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if stacked is not None:
            self._share(stacked.to(fn(stacked.codes).device))
        return applied


def _factors(low_rank: LowRank | None) -> tuple[Tensor, Tensor] | None:
    return None if low_rank is None else (low_rank.a, low_rank.b)


def _multiply(
    ops: Ops,
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Multiply ``x`` (..., K) by ``weight`` (N, K), which ``factors`` (a and b) change: (..., N)."""
    if factors is not None:
        return ops.lora_linear(x, weight, *factors, 1.0, bias)
    if isinstance(weight, NF4Weight):
        return ops.nf4_matmul(x, weight, bias)
    return ops.linear(x, weight, bias)
