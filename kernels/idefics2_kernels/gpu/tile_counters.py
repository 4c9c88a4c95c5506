"""Which of the programs that share a tile comes last.

It adds the parts of all, in place of a second launch.

Each program stores its part and counts itself at the tile's counter; the one that counts the last
part knows that all others are in memory. Who that is changes from run to run, but not what it does:
it reads every part, its own too, in the order of the parts. It also sets the counter back, so that
counters are zero between launches and nothing clears them.

Launches that may run at the same time must not share a counter. Those of one stream run in turn and
share the stream's buffer. A CUDA graph runs on any stream, so each launch that is recorded gets
counters that no other ever has: some 30 KB for a decode step of the 8B model. Both are kept for
good, since a graph holds their addresses. A kernel that fails halfway would leave counters behind,
but it leaves the process without its CUDA context as well.
"""

import functools
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILES = 1024  # that a launch shares among programs: fewer than there are programs at once
GRAPH_COUNTERS = 2**20  # counters of a buffer for graphs, 4 MB
_LOW = 2**18  # more than one graph takes


@triton.jit
def is_last(counters_ptr, tile, parts):
    """Count this program among the ``parts`` of ``tile`` after all it stored.

    Return whether it is the last.

    What the others stored must be read past the L1 cache (``cache_modifier=".cg"``), which may hold
    older lines.
    """
    tl.debug_barrier()  # a program's threads count as one: all of them must have stored
    # releases what they stored, for those that come later, and acquires what others did; a barrier
    # follows
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.store(counters_ptr + tile, 0)
    return arrived == parts - 1


class DeviceCounters:
    """The counters of one device, all zero where no kernel runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of_streams: dict[int, Tensor] = {}
        self.graph_buffers: list[Tensor] = []  # the last has counters left
        self.num_recorded = GRAPH_COUNTERS  # of the last
        self._lock = threading.Lock()

    def for_stream(self, stream: int) -> Tensor:
        """Return those of ``stream``."""
        if GRAPH_COUNTERS - self.num_recorded < _LOW and self.device.type == "cuda":
            self._refill()
        if stream not in self._of_streams:
            fresh = torch.zeros(MAX_TILES, dtype=torch.int32, device=self.device)
            self._of_streams.setdefault(stream, fresh)
        return self._of_streams[stream]

    def _refill(self) -> None:
        # here and not when they are needed: while a graph is recorded, nothing is set to zero
        fresh = torch.zeros(GRAPH_COUNTERS, dtype=torch.int32, device=self.device)
        torch.cuda.current_stream(
            self.device
        ).synchronize()  # other streams do not wait for this one
        with self._lock:
            self.graph_buffers.append(fresh)
            self.num_recorded = 0

    def for_graph(self, tiles: int) -> Tensor:
        """Return ``tiles`` that were never returned before."""
        with self._lock:
            begin, end = self.num_recorded, self.num_recorded + tiles
            if end > GRAPH_COUNTERS:
                raise RuntimeError(
                    "no counters are left to record a CUDA graph with: run once what is to be recorded"
                )
            self.num_recorded = end
            return self.graph_buffers[-1][begin:end]


@functools.cache
def _device_counters(device: torch.device) -> DeviceCounters:
    return DeviceCounters(device)


def get_counters(tiles: int, device: torch.device) -> Tensor:
    """Return ``tiles`` counters at zero for one launch on the current stream of ``device``.

    Raises:
        RuntimeError: A CUDA graph is being recorded, and no such launch ran before outside of one.
    """
    assert tiles <= MAX_TILES, tiles
    own = _device_counters(device)
    if device.type != "cuda":
        return own.for_stream(0)
    if torch.cuda.is_current_stream_capturing():
        return own.for_graph(tiles)
    return own.for_stream(torch.cuda.current_stream(device).cuda_stream)
