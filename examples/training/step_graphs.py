"""CUDA graphs of a whole training step, one for each shape of batch.

A step of the small model is about two thousand launches. The CPU needs longer to launch them than
the GPU needs to run them, and a graph launches them all at once. The first batch of a shape runs
eagerly, which sets up the libraries for it. The second one is captured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training_data import Batch, BatchShape

Step = Callable[[Batch], Tensor]


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    # The graph reads this batch
    batch: Batch
    # The graph writes this loss
    loss: Tensor


class StepGraphs:
    """A runner of ``step`` that uses a CUDA graph from a shape's second batch on."""

    def __init__(self, step: Step) -> None:
        self._step = step
        # All graphs share one pool, because no two of them run at once
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._seen: set[BatchShape] = set()
        self._captured: dict[BatchShape, _Captured] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step on ``batch``; return the loss, still on the device."""
        shape = batch.shape
        if shape not in self._seen:
            self._seen.add(shape)
            return self._step(batch)
        captured = self._captured.get(shape)
        if captured is None:
            captured = self._captured[shape] = self._capture(batch)
        for held, given in zip(captured.batch.inputs, batch.inputs, strict=True):
            held.copy_(given)
        captured.graph.replay()
        # The loss is copied, because another graph may overwrite its memory
        return captured.loss.clone()

    def _capture(self, batch: Batch) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        held = batch.clone()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # The thread that makes the next round may allocate and copy meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            loss = self._step(held)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Captured(graph, held, loss)
