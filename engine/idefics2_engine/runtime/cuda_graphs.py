"""CUDA graphs: a forward pass captured once for each of a few sizes, and replayed.

A forward pass launches hundreds of kernels, and for most sizes launching them takes the host longer
than running them takes the device. Replaying a graph is a single launch. A graph has fixed sizes
and reads its inputs from fixed addresses, so a step is padded to the next captured size.
"""

import contextlib
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

_logger = logging.getLogger(__name__)


class GraphPool:
    """Captures graphs on ``device`` that share one memory pool: they never run at the same time.

    Results that outlive a replay must be copied to tensors that were allocated outside a capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_graphs = 0
        self._pool: Any = None
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._begin = time.perf_counter()
        torch.cuda.empty_cache()
        self._free = torch.cuda.mem_get_info(device)[0]

    @torch.inference_mode()
    def capture(self, forward: Callable[[], None], *, warm_up: bool) -> torch.cuda.CUDAGraph:
        """Capture ``forward``.

        Args:
            forward: Launches kernels on fixed tensors, without waiting for the device.
            warm_up: Whether to run it once before, which initializes libraries and the kernels'
                counters. The largest forward pass of a kind needs it.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            if warm_up:
                forward()
            # Kernels may be compiled and loaded during a capture, and other threads may allocate
            graph.capture_begin(self._pool, capture_error_mode="relaxed")
            try:
                forward()
            except BaseException:
                # A capture that failed may not end either, which would hide the cause
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._pool = graph.pool()
        self.num_graphs += 1
        return graph

    def finish(self) -> None:
        """Free the memory of the runs before captures, and log what the graphs took."""
        torch.cuda.empty_cache()
        _logger.info(
            "captured %d CUDA graphs in %.1f s, %.2f GB",
            self.num_graphs,
            time.perf_counter() - self._begin,
            (self._free - torch.cuda.mem_get_info(self._device)[0]) / 1e9,
        )


def sizes_up_to(most: int, steps: Sequence[tuple[int, int]]) -> list[int]:
    """Return sizes to capture: multiples of a step, up to the first that is at least ``most``.

    Args:
        most: Largest size that is needed.
        steps: Pairs of a limit and the step up to this limit, in ascending order. The last limit is
            at least ``most``.
    """
    sizes: list[int] = []
    for limit, step in steps:
        begin = sizes[-1] if sizes else 0
        sizes += range(begin // step * step + step, limit + 1, step)
    return sizes[: bisect_left(sizes, most) + 1]


def next_size(sizes: Sequence[int], count: int) -> int:
    """Return the smallest of the ascending ``sizes`` that is at least ``count``."""
    return sizes[bisect_left(sizes, count)]
