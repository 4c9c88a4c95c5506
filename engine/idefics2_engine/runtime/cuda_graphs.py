"""Decode steps as CUDA graphs, captured once for each of a few batch sizes and replayed.

A decode step launches hundreds of small kernels, and launching them takes longer than running them.
A graph is a single launch. It reads its inputs from fixed buffers. A batch is padded to the next
captured size, and kernels neither read nor write the KV cache for padding.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.device import to_device
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.input_batch import (
    NOTHING,
    PackedStep,
    padded,
    resolve_pending_tokens,
    text_batch,
)
from idefics2_engine.runtime.kv_cache import KVCache

_logger = logging.getLogger(__name__)
# For larger batches, the device needs longer for a step than the CPU for its launches
MAX_SIZE = 512
# These runs compile kernels and initialize libraries, which must not happen during capture
_WARM_UP = 2


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph with its input buffer and its output logits (size, vocabulary)."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class DecodeGraphs:
    """CUDA graphs of one model and one KV cache, all captured on construction.

    Args:
        model: Model on a CUDA device.
        kv_cache: KV cache that the graphs read and write.
        last_tokens: (sequences,) int32, tokens of the previous step, to which inputs may refer.
        max_pages: Most pages of a sequence.
    """

    def __init__(
        self, model: Idefics2, kv_cache: KVCache, last_tokens: Tensor, max_pages: int
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.last_tokens = last_tokens
        self.max_pages = max_pages
        self.sizes = graph_sizes(len(last_tokens))
        # Graphs never run at the same time, so they share one memory pool
        self._pool: Any = None
        begin = time.perf_counter()
        # The largest graph is captured first, and the others reuse its memory
        with torch.inference_mode():
            self._captured = {size: self.capture(size) for size in reversed(self.sizes)}
        _logger.info(
            "captured %d CUDA graphs, for up to %d sequences, in %.1f s",
            len(self.sizes),
            self.sizes[-1],
            time.perf_counter() - begin,
        )

    def can_run(self, packed: PackedStep) -> bool:
        """Return whether ``packed`` is a decode step that fits the largest graph."""
        return packed.is_decode and len(packed.input_ids) <= self.sizes[-1]

    def run(self, packed: PackedStep) -> Tensor:
        """Replay the graph for a step of B sequences for which ``can_run`` is true.

        Returns:
            Logits (B, vocabulary), which the next step overwrites.
        """
        count = len(packed.input_ids)
        size = next(size for size in self.sizes if size >= count)
        captured = self._captured[size]
        to_device(padded(packed, size, self.max_pages).arrays(), self.model.device, captured.inputs)
        captured.graph.replay()
        return captured.logits[:count]

    def capture(self, size: int) -> _CapturedGraph:
        """Capture the step that decodes ``size`` sequences."""
        empty = padded(NOTHING, size, self.max_pages)
        copies = to_device(empty.arrays(), self.model.device)
        # All inputs are views of one storage
        inputs = copies[0].new_empty(0).set_(copies[0].untyped_storage())

        def forward() -> Tensor:
            batch = text_batch(
                copies, resolve_pending_tokens(copies[0], self.last_tokens), empty, every_row=True
            )
            logits: Tensor = self.model(batch, None, self.kv_cache.layers)
            return logits

        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                forward()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = graph.pool()
        return _CapturedGraph(graph, inputs, logits)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture: 1, 2, 4, then multiples of 8 until one fits all or 512."""
    most = min(max_num_seqs, MAX_SIZE)
    sizes = [1, 2, 4, *range(8, most + 8, 8)]
    return sizes[: 1 + next(i for i, size in enumerate(sizes) if size >= most)]
