"""Hooks on a model's modules, and what transformers records by its own."""

from typing import Any

from torch import nn
from transformers.utils import output_capturing


def is_unhooked(module: nn.Module) -> bool:
    """Return whether nobody sees or changes what ``module`` computes.

    After a call with ``output_hidden_states``, transformers leaves hooks behind. They do nothing
    unless ``is_recording``.
    """
    # accelerate's hooks set a ``forward`` of their own
    if "forward" in module.__dict__:
        return False
    if not (module._forward_hooks or module._forward_pre_hooks):
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all(_home(hook) == output_capturing.__name__ for hook in hooks)


def is_recording() -> bool:
    """Return whether transformers records states or weights of layers in this call."""
    collector: Any = output_capturing._active_collector
    return bool(collector.get())


def record_as(own: type[nn.Module], theirs: Any) -> None:
    """Let transformers record of ``own`` what it records of ``theirs``, which ``own`` extends.

    transformers finds what a class can record by the class's name.
    """
    registry: dict[str, Any] = output_capturing._CAN_RECORD_REGISTRY
    dict.__setitem__(registry, str(own), theirs._can_record_outputs)


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", "") or type(hook).__module__)
