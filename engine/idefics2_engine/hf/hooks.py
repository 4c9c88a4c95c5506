"""Hooks on a model's modules."""

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


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", "") or type(hook).__module__)
