"""Compiled kernels and captured CUDA graphs are counted."""

from typing import Any

import pytest
import torch

from idefics2_bench.compilations import counted_compilations


def test_compiled_kernels_are_counted() -> None:
    knobs = pytest.importorskip("triton").knobs
    seen = []

    def before(**facts: Any) -> bool:
        seen.append(facts["key"])
        return True

    def compile(key: str) -> Any:
        return knobs.runtime.jit_cache_hook(key=key)

    own = knobs.runtime.jit_cache_hook
    with counted_compilations() as counts:
        # None lets Triton go on
        assert [compile("a"), compile("b")] == [None, None]
    assert knobs.runtime.jit_cache_hook is own
    assert (counts.kernels, counts.graphs) == (2, 0)
    try:
        knobs.runtime.jit_cache_hook = before
        with counted_compilations() as counts:
            assert compile("c")
        assert knobs.runtime.jit_cache_hook is before
    finally:
        knobs.runtime.jit_cache_hook = own
    assert (counts.kernels, seen) == (1, ["c"])


def test_captured_graphs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda *arguments: captured.append(arguments)
    )
    with counted_compilations() as counts:
        torch.cuda.CUDAGraph.capture_begin("graph", "pool")  # type: ignore[arg-type]
        assert counts.graphs == 1
    torch.cuda.CUDAGraph.capture_begin("graph", "pool")  # type: ignore[arg-type]
    assert counts.graphs == 1
    assert captured == [("graph", "pool")] * 2


@pytest.mark.gpu
def test_kernels_and_graphs_are_counted_once_on_a_gpu() -> None:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def add(x_ptr: Any, BLOCK: tl.constexpr) -> None:
        offs = tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)

    x = torch.zeros(64, device="cuda")
    with counted_compilations() as counts:
        for block in (64, 32, 64):
            add[(1,)](x, BLOCK=block)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
        graph.replay()
    assert (counts.kernels, counts.graphs) == (2, 1)
