"""Loads and stores by pointers, and the asynchronous copies of Ampere."""

import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gluon_emulator.program import state
from gluon_emulator.registers import Array
from gluon_emulator.shared_memory import Shared


def flat(tensor: Tensor) -> Tensor:
    """Return the memory from a tensor's first element to its last."""
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent + 1,), (1,))


class Pointer:
    """An address or an array of addresses."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, np.asarray(self.offset + offset, dtype=np.int64))

    def read(self, mask: Any, other: float) -> Array:
        """Return the values in memory, and ``other`` where ``mask`` is false.

        fp32 stays fp32. All other floats become float64.
        """
        mask, offset = np.broadcast_arrays(mask, self.offset)
        assert (offset[mask] >= 0).all(), "read before a tensor"
        memory = flat(self.tensor)
        values = memory[torch.from_numpy(offset[mask].copy())]
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.double()
        if not values.dtype.is_floating_point:
            # Kernels cast bytes before they compute with them
            values = values.long()
        result = np.full(mask.shape, other, dtype=values.numpy().dtype)
        result[mask] = values.numpy()
        return result.view(Array)


def load(pointer: Pointer, mask: Any = True, other: float = 0, eviction_policy: str = "") -> Any:
    values = pointer.read(mask, other)
    return values if values.ndim or values.dtype.kind == "f" else int(values)


def store(pointer: Pointer, values: Any, mask: Any = True) -> None:
    mask, offset, values = np.broadcast_arrays(mask, pointer.offset, values)
    assert (offset[mask] >= 0).all(), "written before a tensor"
    places = torch.from_numpy(offset[mask].copy())
    assert len(places.unique()) == len(places), "written twice"
    flat(pointer.tensor)[places] = torch.from_numpy(values[mask].copy()).to(pointer.tensor.dtype)


def atomic_add(pointer: Pointer, value: int) -> int:
    """Add and return the previous value; programs run one after another."""
    place = flat(pointer.tensor)[int(pointer.offset)]
    before = int(place)
    place += value
    return before


def copy_later(smem: Shared, pointer: Pointer, mask: Any) -> None:
    """Add a copy that runs when it is waited for."""
    state.group.append(lambda: smem.store(pointer.read(mask, 0)))


def commit_group() -> None:
    state.groups.append(state.group)
    state.group = []


def wait_group(outstanding: int) -> None:
    while len(state.groups) > outstanding:
        for copy in state.groups.pop(0):
            copy()
