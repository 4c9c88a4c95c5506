"""Counts of what must not happen while requests run: compiled kernels and captured CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch


@dataclass
class Compilations:
    """Counts since the block was entered.

    Attributes:
        kernels: Triton's kernels that were compiled, or loaded from its cache on disk, for sizes or
            types that the process had not met.
        graphs: CUDA graphs that were captured.
    """

    kernels: int = 0
    graphs: int = 0


@contextmanager
def counted_compilations() -> Iterator[Compilations]:
    """Count what all threads compile and capture inside the block."""
    counts = Compilations()
    capture_begin = torch.cuda.CUDAGraph.capture_begin

    def capture(*arguments: Any, **options: Any) -> Any:
        counts.graphs += 1
        return capture_begin(*arguments, **options)

    with patch.object(torch.cuda.CUDAGraph, "capture_begin", capture):
        if find_spec("triton") is None:
            yield counts
            return
        from triton import knobs

        before = knobs.runtime.jit_cache_hook

        def compile(**facts: Any) -> Any:
            counts.kernels += 1
            # True would keep Triton from compiling
            return before(**facts) if before is not None else None

        knobs.runtime.jit_cache_hook = compile
        try:
            yield counts
        finally:
            knobs.runtime.jit_cache_hook = before
