"""The operations that the patched modules of one model call, and when they are not called."""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from idefics2_engine.hf.training.kept_attention import keeping_attention
from idefics2_kernels import (
    REFERENCE,
    REFERENCE_GRADIENTS,
    TRITON,
    TRITON_GRADIENTS,
    Gradients,
    Ops,
    differentiable,
)

_log = logging.getLogger(__name__)

GRADIENTS = "needs gradients"
AUTOCAST = "runs under torch.autocast to another dtype"
COMPILED = "is compiled by torch.compile"
MIXED = "mixes dtypes"

KERNELS = replace(TRITON_GRADIENTS, perceiver_attention=REFERENCE_GRADIENTS.perceiver_attention)
"""The gradients on CUDA. The perceiver's attention is a small part of a step and has no kernel."""

Table = TypeVar("Table", Ops, Gradients)


class Operations:
    """The choice of operations that all patched modules of one model share.

    Args:
        ops: The operations. If ``None``, ``TRITON`` for tensors on CUDA and ``REFERENCE`` for
            others, so that a model can be moved after it was loaded.
        gradients: Their gradients. If ``None``, those of the default operations. With ``ops`` there
            are none then, and transformers' own operations run where gradients are needed.
    """

    def __init__(self, ops: Ops | None = None, gradients: Gradients | None = None) -> None:
        self._ops = ops
        self._gradients = gradients
        self._logged: set[str] = set()
        # By device and whether autograd records them or autocast is on
        self._tables: dict[tuple[str, bool, bool], Ops] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled with a model: all but functions that are made here."""
        return self.__dict__ | {"_tables": {}}

    def for_call(self, *tensors: Tensor, module: nn.Module | None = None) -> Ops | None:
        """Return the operations for ``tensors``, or ``None`` where transformers' own must run.

        Autograd records them if gradients are needed, for ``tensors`` or for a parameter of
        ``module``. transformers' own must run if there are no such gradients, while
        ``torch.compile`` traces, if ``tensors`` differ in dtype, and if autocast would change it.
        The first time that a model meets one of these, the log says so.
        """
        device = tensors[0].device
        reason = _obstacle(tensors)
        is_recorded = reason is None and needs_gradients(*tensors, module=module)
        if is_recorded and self._gradients_on(device) is None:
            reason = GRADIENTS
        if reason is None:
            return self._table(device, is_recorded)
        # The log has locks, which cannot be traced
        if reason != COMPILED and reason not in self._logged:
            self._logged.add(reason)
            _log.warning("A forward that %s uses transformers' own operations", reason)
        return None

    def gradients_for_call(self, *tensors: Tensor) -> Gradients | None:
        """Return the gradients for ``tensors``, or ``None`` where transformers' own must run."""
        device = tensors[0].device
        gradients = None if _obstacle(tensors) else self._gradients_on(device)
        if gradients is None or not torch.is_autocast_enabled(device.type):
            return gradients
        return _without_autocast(gradients, device.type)

    def on(self, device: torch.device) -> Ops:
        """Return the operations for tensors on ``device``."""
        return self._ops or (TRITON if device.type == "cuda" else REFERENCE)

    def _gradients_on(self, device: torch.device) -> Gradients | None:
        if self._gradients is not None or self._ops is not None:
            return self._gradients
        return KERNELS if device.type == "cuda" else REFERENCE_GRADIENTS

    def _table(self, device: torch.device, is_recorded: bool) -> Ops:
        kind = device.type, is_recorded, torch.is_autocast_enabled(device.type)
        if kind not in self._tables:
            self._tables[kind] = self._make_table(device, *kind[1:])
        return self._tables[kind]

    def _make_table(self, device: torch.device, is_recorded: bool, is_autocast: bool) -> Ops:
        ops, gradients = self.on(device), self._gradients_on(device)
        if is_autocast:
            ops = _without_autocast(ops, device.type)
        if gradients is None:
            return ops
        if is_autocast:
            gradients = _without_autocast(gradients, device.type)
        ops = keeping_attention(ops)
        return differentiable(ops, gradients) if is_recorded else ops


def needs_gradients(*tensors: Tensor, module: nn.Module | None = None) -> bool:
    """Return whether autograd records a call with ``tensors`` and the parameters of ``module``."""
    return torch.is_grad_enabled() and (
        any(tensor.requires_grad for tensor in tensors)
        or (module is not None and any(p.requires_grad for p in module.parameters()))
    )


def _obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    if torch.compiler.is_compiling():
        return COMPILED
    first = tensors[0]
    kind = first.device.type
    # Where all is in autocast's dtype already, products are the same with and without it
    if torch.is_autocast_enabled(kind) and first.dtype != torch.get_autocast_dtype(kind):
        return AUTOCAST
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return MIXED
    return None


def _without_autocast(table: Table, device_type: str) -> Table:
    """Return ``table``, whose sums in wider dtypes autocast does not narrow."""

    def switch(call: Callable[..., Any]) -> Callable[..., Any]:
        inside: Callable[..., Any] = torch.autocast(device_type, enabled=False)(call)
        return inside

    changed: Any = {field.name: switch(getattr(table, field.name)) for field in fields(table)}
    return replace(table, **changed)


# Of modules that call the attention but belong to no patched model
_DEFAULT = Operations()


def operations_of(module: nn.Module) -> Operations:
    """Return the operations that ``set_operations`` gave to ``module``, or the default ones."""
    found = module.__dict__.get("idefics2_operations", _DEFAULT)
    assert isinstance(found, Operations)
    return found


def set_operations(module: nn.Module, operations: Operations) -> None:
    """Let ``module`` call ``operations``."""
    module.__dict__["idefics2_operations"] = operations
