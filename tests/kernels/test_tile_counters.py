"""Programs that share a tile: the last one to arrive adds the parts and resets the counters.

Any of the programs may be the last.
"""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.catalog import rows
from idefics2_kernels.catalog.criterion import case_error
from idefics2_kernels.gpu import tile_counters
from idefics2_kernels.gpu.tile_counters import get_counters, is_last
from idefics2_kernels.matmul import linear

# Cases of the model whose tiles are divided among programs
SHARED = (
    ("linear", "4096x14336-m1"),
    ("paged_attention", "decode-b1-s4096"),
    ("paged_attention", "decode-shared-b64-s1088"),
    ("paged_attention", "decode-shared-b256-s1088"),
    ("perceiver_attention", "perceiver-1x4964"),
)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, parts_ptr, last_ptr, counters_ptr, N, BLOCK: tl.constexpr
):
    tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (tile * parts + part) * N + offs, mask=offs < N, other=0)
    tl.store(parts_ptr + tile * parts + part, tl.sum(x, axis=0))
    if is_last(counters_ptr, tile, parts):
        total = 0
        for i in range(parts):
            total += tl.load(parts_ptr + tile * parts + i, cache_modifier=".cg")
        tl.store(out_ptr + tile, total)
        tl.atomic_add(last_ptr + tile, 1)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_one_program_of_a_tile_sees_all_parts(parts: int, device: torch.device) -> None:
    tiles, N = 5, 100
    x = torch.randint(-1000, 1000, (tiles, parts, N), dtype=torch.int32, device=device)
    out, seen, last = x.new_empty(tiles), x.new_empty(tiles, parts), x.new_zeros(tiles)
    for count in (1, 2, 3):
        seen.fill_(-1)
        used = get_counters(tiles, device)
        _sum_kernel[(tiles, parts)](x, out, seen, last, used, N, BLOCK=128)
        assert torch.equal(out, x.sum((1, 2), dtype=torch.int32))
        assert torch.equal(last, torch.full_like(last, count))
        assert not used.any()


def test_counters_are_zero_after_products(device: torch.device) -> None:
    x, weight = torch.randn(3, 2048, device=device), torch.randn(130, 2048, device=device)
    first = linear.split_k(x, weight)
    assert not get_counters(tile_counters.MAX_TILES, device).any()
    assert torch.equal(linear.split_k(x, weight), first)


def test_graphs_share_no_counter() -> None:
    own = tile_counters.DeviceCounters(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="run once what is to be recorded"):
        own.for_graph(1)
    own.graph_buffers, own.num_recorded = (
        [torch.zeros(tile_counters.GRAPH_COUNTERS, dtype=torch.int32)],
        0,
    )
    taken = [own.for_graph(tiles) for tiles in (3, 1, 1024)]
    places = [place for own in taken for place in range(own.data_ptr(), own[-1:].data_ptr() + 1, 4)]
    assert len(set(places)) == len(places) == 1028
    for _ in range(tile_counters.GRAPH_COUNTERS // 1024 - 2):
        own.for_graph(1024)
    with pytest.raises(RuntimeError, match="no counters are left"):
        own.for_graph(1024)


def _call(kernel: str, case_name: str, device: torch.device) -> Callable[[], Tensor]:
    """Return a call of a catalog case whose result is checked once, when it is launched alone."""
    spec, implementation, case = next(
        row for row in rows("model") if (row[0].name, row[2].name) == (kernel, case_name)
    )
    inputs = spec.make_inputs(case, device)
    assert case_error(spec, implementation, case, inputs) <= 1
    return lambda: spec.implementations[implementation](**inputs)


def _record(call: Callable[[], Tensor], times: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for _ in range(times)]
    return graph, outputs


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case_name"), SHARED)
def test_graph_gives_the_same_bits_each_time(
    kernel: str, case_name: str, device: torch.device
) -> None:
    call = _call(kernel, case_name, device)
    expected = call()
    graph, outputs = _record(call, 3)
    for _ in range(100):
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case_name"), SHARED)
def test_graphs_may_run_concurrently(kernel: str, case_name: str, device: torch.device) -> None:
    call = _call(kernel, case_name, device)
    expected = call()
    recorded = [_record(call, 20) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in recorded]
    torch.cuda.synchronize()
    eager = []
    for _ in range(50):
        for stream, (graph, _) in zip(streams, recorded, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager.append(call())
    torch.cuda.synchronize()
    outputs = [output for _, own in recorded for output in own] + eager
    assert all(torch.equal(output, expected) for output in outputs)
