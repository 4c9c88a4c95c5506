"""Decode steps as CUDA graphs: captured once for each of a few batch sizes, and replayed.

A step of one token a sequence launches hundreds of small kernels, which take a CPU longer to launch
than a GPU to run. A graph is launched as one. It reads its inputs from buffers of its own; a batch
between two sizes is padded to the larger one, and for the padding no kernel reads or writes the
cache.
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
MAX_SIZE = 512  # the device then takes longer over a step than a CPU over its launches
_WARM_UP = 2  # runs that compile kernels and set up libraries before one is captured


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph, where its inputs go and where its logits (size, vocabulary) come out."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class DecodeGraphs:
    """Graphs of one model over one KV cache, all captured at once: no request has to wait for one.

    Args:
        model: On a CUDA device.
        kv_cache: That its graphs read and write.
        last_tokens: (sequences,) int32, the tokens of the step before, which inputs may refer to.
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
        self._pool: Any = None  # memory that all share: one runs at a time
        begin = time.perf_counter()
        with torch.inference_mode():  # the largest first, whose memory then serves the others
            self._captured = {size: self.capture(size) for size in reversed(self.sizes)}
        _logger.info(
            "captured %d CUDA graphs, for up to %d sequences, in %.1f s",
            len(self.sizes),
            self.sizes[-1],
            time.perf_counter() - begin,
        )

    def can_run(self, packed: PackedStep) -> bool:
        """Whether it is a decode step, of no more sequences than the largest graph."""
        return packed.is_decode and len(packed.input_ids) <= self.sizes[-1]

    def run(self, packed: PackedStep) -> Tensor:
        """Compute a step that ``can_run``, of B sequences.

        Return logits (B, vocabulary), which the next one overwrites.
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
        inputs = copies[0].new_empty(0).set_(copies[0].untyped_storage())  # all of them

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
    """Return the batch sizes to capture: 1, 2, 4, multiples of 8, to the first that holds all."""
    most = min(max_num_seqs, MAX_SIZE)
    sizes = [1, 2, 4, *range(8, most + 8, 8)]
    return sizes[: 1 + next(i for i, size in enumerate(sizes) if size >= most)]
