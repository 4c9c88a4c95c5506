"""Memory that worker processes write pixels to, and the engine copies them to the device from.

It is anonymous, so that nothing is left of it when the last process ends, and sparse: only pages
that were written exist. Blocks of it are freed when the last array over them is gone.
"""

import contextlib
import mmap
import os
import weakref
from bisect import bisect
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt

Block = tuple[int, int]
"""Begin and end in bytes."""


class FreeRanges:
    """The free parts of a range of bytes: first fit, neighbors joined."""

    def __init__(self) -> None:
        self._ranges: list[Block] = []

    @property
    def num_free(self) -> int:
        """Bytes that are free."""
        return sum(end - begin for begin, end in self._ranges)

    def take(self, size: int) -> Block | None:
        """Return the first block of ``size`` bytes that is free, ``None`` if none is."""
        for index, (begin, end) in enumerate(self._ranges):
            if end - begin >= size:
                self._ranges[index : index + 1] = [(begin + size, end)] * (end - begin > size)
                return begin, begin + size
        return None

    def add(self, block: Block) -> None:
        """Free ``block``, which is not free."""
        begin, end = block
        if begin == end:
            return
        at = bisect(self._ranges, block)
        before, after = self._ranges[:at][-1:], self._ranges[at : at + 1]
        first, last = at, at
        if before and before[0][1] == begin:
            begin, first = before[0][0], at - 1
        if after and after[0][0] == end:
            end, last = after[0][1], at + 1
        self._ranges[first:last] = [(begin, end)]


class SharedMemory:
    """Anonymous shared memory.

    Args:
        size: Bytes.

    Attributes:
        fd: A descriptor for worker processes.
        size: Bytes.
        address: Where it begins in this process.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("idefics2-pixels")
        self.size = size
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.address: int = np.frombuffer(self._map, np.uint8).ctypes.data
        self._free = FreeRanges()
        # A finalizer runs at any moment, even in a call of this object, so it must not wait for a
        # lock. A queue's ``put`` may be called again while it runs
        self._dead: SimpleQueue[Block] = SimpleQueue()

    def close(self) -> None:
        """Close the descriptor; arrays remain valid."""
        with contextlib.suppress(OSError):
            os.close(self.fd)

    def add(self, block: Block) -> None:
        """Add ``block`` to those that ``take`` returns."""
        self._dead.put(block)

    @property
    def num_free(self) -> int:
        """Bytes of the blocks that nobody has."""
        self._collect()
        return self._free.num_free

    def take(self, size: int) -> Block | None:
        """Return a free block of ``size`` bytes, ``None`` if there is none; for one thread a time."""
        self._collect()
        return self._free.take(size)

    def array(self, block: Block) -> npt.NDArray[np.uint8]:
        """Return the bytes of ``block``."""
        begin, end = block
        return np.ndarray((end - begin,), np.uint8, self._map, begin)

    def owner(self, block: Block) -> npt.NDArray[np.uint8]:
        """Return the bytes of ``block``, which is free when the array and its views are gone."""
        owner = self.array(block)
        weakref.finalize(owner, self._dead.put, block).atexit = False
        return owner

    def _collect(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._free.add(self._dead.get_nowait())
