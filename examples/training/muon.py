"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024).

An update is scaled to the size of AdamW's, as in "Muon is Scalable for LLM Training" (Liu et al.,
2025), so both optimizers use one learning rate. torch.optim.Muon does not fit here for two reasons.
It needs the rate as a Python number, which a captured step could not change. It also updates one
matrix at a time, while most matrices of a small model share a few shapes and can be updated
together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_MOMENTUM = 0.95
# Coefficients of a quintic polynomial whose iteration drives singular values to about one
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Root mean square of AdamW's usual update
_ADAMW_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """The Muon optimizer for matrices. ``lr`` is a tensor that may change between steps."""

    def __init__(self, params: Iterable[Tensor], lr: Tensor, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            decay = 1 - group["lr"] * group["weight_decay"]
            for shape, parameters in by_shape.items():
                update = orthogonal(torch.stack([self._momentum(p) for p in parameters]))
                update *= group["lr"] * _ADAMW_SIZE * max(shape) ** 0.5
                for parameter, change in zip(parameters, update.unbind(), strict=True):
                    parameter.mul_(decay).sub_(change)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Add the gradient to the momentum and return Nesterov's look-ahead."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        ahead: Tensor = parameter.grad.lerp(average, _MOMENTUM)
        return ahead


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the approximate orthogonal factor of ``matrices`` (B, M, N).

    Its singular values are between 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    orthogonalized: Tensor = x.mT if tall else x
    return orthogonalized.to(matrices.dtype)
