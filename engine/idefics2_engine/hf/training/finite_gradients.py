"""A callback of transformers' ``Trainer`` that stops at gradients which are not finite."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class FiniteGradients(TrainerCallback):
    """Stop ``Trainer`` before a step whose gradients are infinite or NaN, and name the tensor.

    ``Trainer`` itself goes on, and every weight is NaN after the step. The gradients are looked at
    as the backward pass forms them, because clipping makes all of them NaN. The device is waited
    for once a step. With ``fp16=True`` nothing is checked: the scaler of the loss skips such steps.

    Raises:
        FloatingPointError: A gradient is not finite. The first one of the backward pass is named.
    """

    def __init__(self) -> None:
        self._is_finite: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients of all parameters that train."""
        if args.fp16:
            return
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad:
                look = partial(self._look, name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(look))

    def _look(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._is_finite[name] = parameter.grad.isfinite().all()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if a gradient of this step is not finite."""
        found, self._is_finite = self._is_finite, {}
        if not found:
            return
        device = next(iter(found.values())).device
        flags = torch.stack([flag.to(device) for flag in found.values()]).tolist()
        bad = [name for name, is_finite in zip(found, flags, strict=True) if not is_finite]
        if bad:
            self._remove_hooks()
            raise FloatingPointError(
                f"gradients must be finite, got one of {bad[0]} in step {state.global_step + 1} "
                f"that is not, the first of {len(bad)} from the loss backward"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at no more gradients."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
