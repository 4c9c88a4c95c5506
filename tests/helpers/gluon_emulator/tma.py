"""The copy engine of Hopper: descriptors of tensors, and copies in any order."""

import random
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gluon_emulator.barriers import Barrier
from gluon_emulator.pointers import flat
from gluon_emulator.program import state
from gluon_emulator.shared_memory import Shared


class Descriptor:
    """A tensor in global memory that is read and written in boxes.

    Elements outside its shape are read as zero.
    """

    def __init__(
        self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: object
    ) -> None:
        self.base, self.shape, self.strides = base, shape, strides
        self.block_type = types.SimpleNamespace(shape=block)
        self.dtype, self.layout = base.dtype, layout

    def _places(self, corner: list[int]) -> tuple[Any, Any]:
        """Return each element's index in the storage, and whether it is inside the shape."""
        # Addresses are of 64 bits, and so is this arithmetic
        places = np.zeros(self.block_type.shape, dtype=np.uint64)
        inside = np.ones(self.block_type.shape, dtype=bool)
        for axis, (first, size) in enumerate(zip(corner, self.block_type.shape, strict=True)):
            along = [1] * len(corner)
            along[axis] = size
            index = (int(first) + np.arange(size)).reshape(along)
            inside &= (index >= 0) & (index < self.shape[axis])
            places = places + index.astype(np.uint64) * np.uint64(self.strides[axis] % 2**64)
        return places & np.uint64(2**64 // self.base.itemsize - 1), inside

    def load(self, corner: list[int]) -> Any:
        places, inside = self._places(corner)
        values = np.zeros(places.shape)
        values[inside] = flat(self.base)[self._indices(places[inside])].double()
        return values

    def store(self, corner: list[int], values: Any) -> None:
        places, inside = self._places(corner)
        flat(self.base)[self._indices(places[inside])] = torch.tensor(values[inside]).to(
            self.base.dtype
        )

    @staticmethod
    def _indices(places: Any) -> Tensor:
        if (places >= 2**63).any():
            raise IndexError("an address before a tensor")
        return torch.from_numpy(places.astype(np.int64))


class CopyEngine:
    """The copy engine: a thread that runs copies in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.waiting: list[Callable[[], None]] = []
        self.changed = threading.Condition()
        self.over = False
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def add(self, copy: Callable[[], None]) -> None:
        with self.changed:
            self.waiting.append(copy)
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.over)
                if not self.waiting:
                    return
                copy = self.waiting.pop(self.random.randrange(len(self.waiting)))
            try:
                copy()
            except (AssertionError, IndexError) as error:
                self.failure = error

    def end(self) -> None:
        with self.changed:
            self.over = True
            self.changed.notify()
        self.thread.join()
        if self.failure:
            raise self.failure


def load_tile(desc: Descriptor, corner: list[int], barrier: Barrier, tile: Shared) -> None:
    assert all(-(2**31) <= place < 2**31 for place in corner), "a coordinate of more than 32 bits"

    def copy() -> None:
        tile.values[...] = desc.load(corner)
        barrier.arrive(0, -tile.values.size * desc.base.itemsize)

    state.copies.add(copy)


def store_wait(pending: int) -> None:
    while len(state.stores) > pending:
        desc, corner, tile = state.stores.pop(0)
        desc.store(corner, tile.values)
