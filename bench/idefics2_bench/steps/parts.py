"""The names of rows of steps, and the families of their parts. It must not import torch."""

from collections.abc import Mapping
from typing import Any

KERNEL = "steps"
"""``kernel`` of all rows of steps."""
WHOLE = "whole step"
"""``operation`` of the row of a step. The other rows are its parts."""

OTHER = "other kernels"
"""Kernels that no operation launched: the embedding, copies, the choice of a token."""
BETWEEN = "between kernels"
"""Time of the device in which no kernel ran."""
OUTSIDE = "outside operations"
"""What a CPU did between the operations."""

_SMALL = "norms, activations, rotary, patches"
FAMILIES = ("products", "attention", _SMALL, OTHER, BETWEEN, OUTSIDE)
"""The families of parts, in the order of charts."""

# By a part of an operation's name. The first that fits counts
_FAMILIES = {
    "linear": "products",
    "nf4": "products",
    "attention": "attention",
    OTHER: OTHER,
    BETWEEN: BETWEEN,
    OUTSIDE: OUTSIDE,
    "": _SMALL,
}


def is_part(row: Mapping[str, Any]) -> bool:
    """Return whether ``row`` is of a part of a step."""
    return row["kernel"] == KERNEL and row.get("operation") != WHOLE


def family(operation: str) -> str:
    """Return the family of a part."""
    return next(family for part, family in _FAMILIES.items() if part in operation)
