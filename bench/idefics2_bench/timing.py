"""Time calls: kernels in CUDA graphs over rotated inputs, and other calls as they are.

A graph contains many calls, each on different inputs, so no call finds its data in the L2 cache and
launch gaps do not count. Implementations alternate, so a drift of the clock affects all equally.
Times are medians.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_REPLAYS = 25
_WARM_UP_SECONDS = 0.05
# Most seconds of an implementation's replays, of which there are at least five
_LONGEST_SECONDS = 0.6


@dataclass(frozen=True)
class Time:
    """Time of one call in milliseconds: the median, and the 20th and 80th percentiles."""

    ms: float
    ms_p20: float
    ms_p80: float

    def shared_by(self, calls: int) -> "Time":
        """Return the time of one call if ``calls`` calls were timed together."""
        return Time(self.ms / calls, self.ms_p20 / calls, self.ms_p80 / calls)


def measure(calls: Mapping[str, list[Call]]) -> dict[str, Time]:
    """Time each implementation's calls in a CUDA graph; return the time of one call.

    An implementation's calls must do the same on different inputs.
    """
    graphs = {name: captured(own) for name, own in calls.items()}
    replays = {name: _replays(graph) for name, graph in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(replays.values())):
        for name, graph in graphs.items():
            if turn < replays[name]:
                samples[name].append(_milliseconds(graph) / len(calls[name]))
    return {name: summary(own) for name, own in samples.items()}


def alternate(
    calls: Mapping[str, Call], rounds: int, warm_up: int, device: torch.device
) -> dict[str, Time]:
    """Time calls in turns, each from an idle device to an idle device, without CUDA graphs.

    Each is timed ``rounds`` times, after ``warm_up`` rounds without timing. Garbage is collected
    between the calls. Collection takes long and would otherwise happen in one call or another.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _without_collection():
        for turn in range(-warm_up, rounds):
            for name, call in calls.items():
                gc.collect()
                synchronize(device)
                begin = time.perf_counter()
                call()
                synchronize(device)
                if turn >= 0:
                    samples[name].append(1e3 * (time.perf_counter() - begin))
    return {name: summary(own) for name, own in samples.items()}


@contextmanager
def _without_collection() -> Iterator[None]:
    """Leave garbage collection to the caller, and freeze the objects that exist now."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def num_copies(bytes_each: int) -> int:
    """Return how many sets of inputs have three times the size of the L2 cache, at most 64."""
    cache: int = torch.cuda.get_device_properties().L2_cache_size
    return max(1, min(64, -(-3 * cache // max(1, bytes_each))))


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of ``calls``, the first two of which run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first calls compile kernels and initialize libraries
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replays(graph: torch.cuda.CUDAGraph) -> int:
    """Warm up and return the number of replays to time."""
    each = max(1e-3, _milliseconds(graph))
    for _ in range(max(1, int(1e3 * _WARM_UP_SECONDS / each))):
        graph.replay()
    return max(5, min(_REPLAYS, int(1e3 * _LONGEST_SECONDS / each)))


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def summary(samples: list[float]) -> Time:
    """Return the median and the percentiles of ``samples`` in milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Time(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])
