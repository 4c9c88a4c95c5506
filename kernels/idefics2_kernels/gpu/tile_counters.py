"""Counters that tell a program whether it is the last to finish its tile.

Several programs share a tile. Each stores its partial result and increments the tile's counter. The
last one adds all partial results, so no second launch is needed. Which program is last changes from
run to run. The result does not change, because the last program reads all parts, including its own,
in a fixed order. It also resets the counter, so counters are zero between launches.

Launches that may run at the same time must not share counters. Launches of one stream run one after
another and share the stream's buffer. A CUDA graph may run on any stream, so each recorded launch
has its own counters: about 30 KB for a decode step of the 8B model. All counters are kept for the
life of the process, because graphs hold their addresses. A kernel that fails does not reset its
counters, but the CUDA context is unusable after such a failure anyway.
"""

import functools
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

# The most tiles of a launch whose programs share tiles. Launches that share tiles because they have
# few of them need one per program that runs at once. Decoding 512 sequences with shared prefixes
# needs one for each sequence and key head.
MAX_TILES = 4096
# Counters of a buffer for graphs, 4 MB.
GRAPH_COUNTERS = 2**20
# A buffer with fewer counters left is replaced. All graphs of an engine use fewer than this.
_LOW = 2**19


@triton.jit
def is_last(counters_ptr, tile, parts):
    """Increment the counter of ``tile`` and return whether this program is the last of ``parts``.

    Call it after the program has stored its partial result. Partial results of other programs must
    be read with ``cache_modifier=".cg"``, because the L1 cache may hold stale lines.
    """
    # One increment stands for all threads of the program, so all of them must have stored.
    tl.debug_barrier()
    # The atomic releases this program's stores and acquires those of the programs before it. The
    # compiler adds a barrier after it.
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.store(counters_ptr + tile, 0)
    return arrived == parts - 1


@triton.jit
def are_last(
    counters_ptr,
    tiles,  # (THREADS,), one for each thread of the program
    mask,  # (THREADS,), of at most the first 64
    parts,
):
    """Do the same as ``is_last`` for several ``tiles``: bit i is set if this is the last of tile i.

    There is one element for each thread, so no two threads increment the same counter.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + tiles, 1, mask=mask, sem="acq_rel", scope="gpu")
    last = mask & (arrived == parts - 1)
    tl.store(counters_ptr + tiles, 0, mask=last)
    place = tl.arange(0, tiles.shape[0]).to(tl.int64)
    bits = tl.sum(tl.where(last, tl.full(place.shape, 1, tl.int64) << (place & 63), 0))
    # No thread may read what others have stored before every increment is done.
    tl.debug_barrier()
    return bits


class DeviceCounters:
    """The counters of one device, all zero while no kernel runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of_streams: dict[int, Tensor] = {}
        # Only the last buffer has unused counters.
        self.graph_buffers: list[Tensor] = []
        # Counters of the last buffer that are in use.
        self.num_recorded = GRAPH_COUNTERS
        self._lock = threading.Lock()

    def for_stream(self, stream: int) -> Tensor:
        """Return the counters of ``stream``: (MAX_TILES,) int32."""
        if GRAPH_COUNTERS - self.num_recorded < _LOW and self.device.type == "cuda":
            self._refill()
        if stream not in self._of_streams:
            fresh = torch.zeros(MAX_TILES, dtype=torch.int32, device=self.device)
            self._of_streams.setdefault(stream, fresh)
        return self._of_streams[stream]

    def _refill(self) -> None:
        # The buffer is allocated before a graph needs it. During recording the zeros would become
        # a part of the graph.
        fresh = torch.zeros(GRAPH_COUNTERS, dtype=torch.int32, device=self.device)
        # Other streams may use the counters without waiting for this stream.
        torch.cuda.current_stream(self.device).synchronize()
        with self._lock:
            self.graph_buffers.append(fresh)
            self.num_recorded = 0

    def for_graph(self, tiles: int) -> Tensor:
        """Return ``tiles`` counters that no other launch uses.

        Raises:
            RuntimeError: No counters are left.
        """
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
    """Return ``tiles`` zeroed counters for one launch on the current stream of ``device``.

    Raises:
        RuntimeError: A CUDA graph is being recorded, and no such launch ran before the recording.
    """
    assert tiles <= MAX_TILES, tiles
    own = _device_counters(device)
    if device.type != "cuda":
        return own.for_stream(0)
    if torch.cuda.is_current_stream_capturing():
        return own.for_graph(tiles)
    return own.for_stream(torch.cuda.current_stream(device).cuda_stream)
