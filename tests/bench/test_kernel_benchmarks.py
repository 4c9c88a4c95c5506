"""The catalog under pytest-benchmark: ``pytest tests/bench --benchmark-only``.

``idefics2_bench.kernels`` also times peers and flushes the L2 cache.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from idefics2_kernels.catalog import Case, KernelSpec, rows


def _ids(value: object) -> str | None:
    if isinstance(value, (Case, KernelSpec)):
        return value.name
    return value if isinstance(value, str) else None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("spec", "implementation", "case"), rows("model"), ids=_ids)
def test_kernel(
    benchmark: BenchmarkFixture, spec: KernelSpec, implementation: str, case: Case
) -> None:
    torch.manual_seed(0)
    inputs = spec.make_inputs(case, torch.device("cuda"))
    function = spec.implementations[implementation]

    def call() -> None:
        function(**inputs)
        torch.cuda.synchronize()

    call()
    cost = spec.cost(case)
    benchmark.extra_info |= {"bytes": cost.bytes, "flops": cost.flops}
    benchmark.pedantic(call, rounds=20, warmup_rounds=3)  # type: ignore[no-untyped-call]
