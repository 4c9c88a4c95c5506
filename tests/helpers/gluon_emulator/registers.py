"""Tensors in registers: numpy arrays without a layout."""

import types
from typing import Any

import numpy as np
import torch


class Array(np.ndarray):
    """A tensor in registers, whose layout does not matter."""

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent=None))
    dtype_name = None

    def to(self, dtype: Any, bitcast: bool = False) -> "Array":
        if bitcast:
            bits = torch.from_numpy(np.asarray(self, dtype=np.uint16).view(np.int16))
            return as_array(bits.view(dtype).double())
        if dtype in TYPES and self.dtype != np.float64:
            return self.astype(TYPES[str(dtype)]).view(Array)
        return self


# The types that values in registers have
TYPES = {"int32": np.int64, "int64": np.int64, "float32": np.float32}


def typed(values: Any, dtype: str) -> Array:
    """Return numbers in the type of computation.

    Integers are wide. An operation that reads their bits truncates them.
    """
    assert not np.isnan(values).any(), "shared memory that nothing was written to"
    return np.asarray(values).astype(TYPES[dtype]).view(Array)


def as_array(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64).view(Array)


def split(values: Any) -> tuple[Any, Any]:
    assert values.shape[-1] == 2
    return values[..., 0], values[..., 1]
