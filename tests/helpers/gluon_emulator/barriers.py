"""Hopper's memory barriers, on which threads wait."""

import threading

# Seconds to wait for a barrier
PATIENCE = 20.0


class Barrier:
    """An mbarrier: a phase ends after all arrivals and all announced bytes."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, arrivals: int, announced: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += announced
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        assert parity in (0, 1)
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase & 1 != parity, PATIENCE)
        assert done, "waited for ever"
