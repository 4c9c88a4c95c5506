"""Training data as a stream of rounds: while one is in use, a thread makes the next.

A round is used for a fixed number of steps. The data of a step therefore depends on its number
alone, however long the data took to make, and a resumed run continues with the round of its step.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from training_data import DataSet


class Rounds:
    """The rounds of training data. At most two are in memory: the one in use and the next."""

    def __init__(self, make: Callable[[int], DataSet], steps: int, device: torch.device) -> None:
        """Use round k, which is ``make(k)``, for ``steps`` steps from step k * ``steps``."""
        # Seconds that steps waited for their data
        self.waited = 0.0
        self._make = make
        self._steps = steps
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1)
        self._number: int | None = None
        self._current: DataSet | None = None
        self._coming: tuple[int, Future[DataSet]] | None = None

    def at(self, step: int) -> DataSet:
        """Return the round of ``step``, waiting until it is made, and drop the round before it."""
        number = step // self._steps
        if number != self._number or self._current is None:
            began = time.monotonic()
            if self._coming is None or self._coming[0] != number:
                self._begin(number)
            assert self._coming is not None
            self._current = self._coming[1].result()
            self._number = number
            self._begin(number + 1)
            self.waited += time.monotonic() - began
        return self._current

    @property
    def current(self) -> DataSet:
        """Return the round of the last step that was asked for."""
        assert self._current is not None
        return self._current

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, number: int) -> None:
        self._coming = number, self._thread.submit(self._made, number)

    def _made(self, number: int) -> DataSet:
        with self._copying():
            return self._make(number)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copy to the GPU beside the training steps; when the context ends, all copies are done."""
        if self._stream is None:
            yield
            return
        # The memory of the round before last is reused, and steps that read it may still be queued
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
