"""Hooks that record tensors of a model while it runs, without a change to what it computes."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from idefics2_engine.parity import stages as names


@dataclass(frozen=True)
class Tap:
    """A place in a model where a stage is read.

    Attributes:
        module: The module that computes the stage, or the one that reads it.
        take: Returns the stage, given the module's output, or its arguments if ``before``. ``None``
            if this call of the module does not compute the stage.
        before: Whether the stage is an input of ``module``.
    """

    module: nn.Module
    take: Callable[[Any], Tensor | None]
    before: bool = False


@dataclass
class Recorder:
    """Records the stages of ``taps`` on the CPU, a list of tensors for each, one a call."""

    taps: Mapping[str, Tap]
    stages: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of_stages(cls, taps: Mapping[str, Tap], order: Collection[str]) -> "Recorder":
        """Return a recorder of those of ``taps`` that the stages in ``order`` need."""
        needed = {*order}
        if names.LOGITS in needed:
            needed.add(names.TEXT_NORM)
        return cls({stage: tap for stage, tap in taps.items() if stage in needed})

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Tensor]]]:
        """Record what runs inside the context; yield the stages, which fill up."""
        self.stages = {}
        hooks = [self._hook(stage, tap) for stage, tap in self.taps.items()]
        try:
            yield self.stages
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, stage: str, tap: Tap) -> Any:
        def keep(value: Any) -> None:
            tensor = tap.take(value)
            if tensor is None:
                return
            # The model may reuse the memory of a stage, so it is copied also on a CPU
            copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            self.stages.setdefault(stage, []).append(copy)

        if tap.before:
            return tap.module.register_forward_pre_hook(lambda _module, args: keep(args))
        return tap.module.register_forward_hook(lambda _module, _args, output: keep(output))
