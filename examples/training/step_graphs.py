"""CUDA graphs of a whole training step, one for each shape of batch.

A step of the small model is some two thousand launches, which take the CPU longer than the GPU needs to run them. A
graph launches them all at once. A shape is run eagerly when it comes first, which sets up the libraries for it, and
captured when it comes again.
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
    batch: Batch  # what the graph reads
    loss: Tensor  # what it writes


class StepGraphs:
    """Runs ``step`` on batches of any shape, from graphs as soon as there are some."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._pool = torch.cuda.graph_pool_handle()  # one for all: no two graphs run at once
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
        return captured.loss.clone()  # its memory is another graph's scratch

    def _capture(self, batch: Batch) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        held = batch.clone()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # the thread that makes the next round may allocate and copy meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            loss = self._step(held)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Captured(graph, held, loss)
