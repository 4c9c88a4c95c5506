"""Shared memory, which starts as NaN."""

import math
from typing import Any

import numpy as np

from gluon_emulator.barriers import Barrier
from gluon_emulator.program import state
from gluon_emulator.registers import TYPES, Array, as_array, typed


class Shared:
    """A view of shared memory."""

    def __init__(self, values: Any, dtype: Any = None, first: int = 0) -> None:
        self.values, self.dtype, self.first = values, dtype, first
        self.shape = list(values.shape)

    def index(self, i: int) -> Any:
        piece = self.values[int(i)]
        first = self.first + int(i) * piece.size
        return piece[0] if piece.dtype == object else Shared(piece, self.dtype, first)

    def reshape(self, shape: list[int]) -> "Shared":
        view = self.values.reshape(shape)
        assert view.base is not None
        return Shared(view, self.dtype)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.values.transpose(order), self.dtype)

    def store(self, values: Any) -> None:
        self.values[...] = values

    def load(self, _layout: object) -> Array:
        if self.dtype in TYPES:
            return typed(self.values, self.dtype)
        return as_array(self.values.copy())

    def reinterpret(self, dtype: object, shape: list[int], _layout: object) -> Any:
        if len(shape) == 6:
            return Boxes(self, shape)
        return (
            self.reshape(shape)
            if math.prod(shape) == self.values.size
            else self.piece(dtype, shape)
        )

    def piece(self, dtype: Any, shape: list[int]) -> "Shared":
        """Return new memory for a piece that starts at this page of an allocation of words.

        It must not overlap with earlier pieces.
        """
        begin = 4 * self.first
        end = begin + math.prod(shape) * (4 if dtype == "float32" else 2)
        assert end <= 4 * state.words.size
        assert all(end <= first or last <= begin for first, last, _ in state.pieces)
        memory = np.full(shape, np.nan)
        state.pieces.append((begin, end, memory))
        return Shared(memory, dtype)

    def _keep_alive(self) -> None:
        pass


class Boxes:
    """Tiles of shared memory (n, 1, 1, rows, 1, columns) as smaller ones, in memory order.

    A tile is stored in column blocks, each as wide as its swizzle, with its rows one after another.
    """

    def __init__(self, tiles: Shared, shape: list[int]) -> None:
        num, _, _, rows, _, columns = tiles.shape
        assert columns in (16, 32, 64, 128)
        assert shape[5] == min(columns, 64)
        parts = num, rows // shape[3], shape[3], columns // shape[5], shape[5]
        self.boxes = tiles.values.reshape(parts).transpose(0, 3, 1, 2, 4)
        self.shape = shape
        assert shape[0] == num * parts[1] * parts[3]

    def index(self, i: int) -> Shared:
        box = self.boxes[np.unravel_index(int(i), self.boxes.shape[:3])]
        return Shared(box[None, None, :, None, :])


def allocate(dtype: Any, shape: list[int], _layout: object) -> Shared:
    if dtype == "int64":
        barriers = np.empty(shape, dtype=object)
        for place in np.ndindex(*shape):
            barriers[place] = Barrier()
        return Shared(barriers)
    memory = np.full(shape, np.nan)
    # Inline assembly reads the allocation that is first in memory
    if state.words is None:
        state.words = memory
    return Shared(memory, dtype)
