"""The operations of a path: which it has, which the reference replaces, and which it calls."""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import wraps
from typing import Any

import torch

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.parity.paths import Path
from idefics2_kernels import REFERENCE, ROW_BY_ROW, TRITON, Ops

OPERATIONS = tuple(field.name for field in fields(Ops))
"""Names of all operations."""


def path_ops(path: Path, device: torch.device) -> Ops:
    """Return the implementation of the operations that ``path`` names.

    Raises:
        ConfigError: Kernels are asked for on a CPU without Triton's interpreter.
    """
    from triton import knobs

    if path.implementation == "triton" and device.type == "cpu" and not knobs.runtime.interpret:
        raise ConfigError(
            "ours:triton must run on a CUDA device, or with TRITON_INTERPRET=1, got a CPU"
        )
    return _named_ops(path, device)


def replaced(path: Path, ops: Ops, device: torch.device) -> list[str]:
    """Return the names of the operations in ``ops`` that are not those that ``path`` names."""
    named = _named_ops(path, device)
    return [name for name in OPERATIONS if getattr(ops, name) is not getattr(named, name)]


def _named_ops(path: Path, device: torch.device) -> Ops:
    default = TRITON if device.type == "cuda" else REFERENCE
    known = {"triton": TRITON, "reference": REFERENCE, "deterministic": ROW_BY_ROW, None: default}
    return known[path.implementation]


def check_swap(path: Path, names: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless ``names`` are operations of ``path`` that can be swapped."""
    for name in names:
        if path.kind != "ours":
            raise ConfigError(f"swap must come with a path of ours as A, got {path}")
        if name not in OPERATIONS:
            raise ConfigError(
                f"an operation to swap must be one of {', '.join(OPERATIONS)}, "
                f"got {short_repr(name)}"
            )


def swapped(ops: Ops, names: Iterable[str]) -> Ops:
    """Return ``ops`` with the reference's operations for ``names``."""
    return replace(ops, **{name: getattr(REFERENCE, name) for name in names})


class CalledOperations:
    """Notes which operations are called, in the order of their first call."""

    def __init__(self) -> None:
        self._called: dict[str, Callable[..., Any]] = {}

    def noting(self, ops: Ops) -> Ops:
        """Return ``ops`` whose calls are noted."""
        return replace(ops, **{name: self._noted(name, ops) for name in OPERATIONS})

    def _noted(self, name: str, ops: Ops) -> Callable[..., Any]:
        operation: Callable[..., Any] = getattr(ops, name)

        @wraps(operation)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._called[name] = operation
            return operation(*args, **kwargs)

        return call

    def other_than_reference(self) -> list[str]:
        """Return the operations that were called and are not those of the reference."""
        return [
            name
            for name, operation in self._called.items()
            if operation is not getattr(REFERENCE, name)
        ]
