"""The attention kernel in Gluon on a CPU: tiles visited, waits, reads and writes."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from gluon_emulator.loader import load_module
from guarded import guarded_allocations
from idefics2_kernels.attention import flash_attention_hopper
from idefics2_kernels.attention.tiles import UNBOUNDED, base_two
from idefics2_kernels.catalog import CATALOG
from idefics2_kernels.catalog import flash_attention as catalog
from idefics2_kernels.catalog.attention import cumulative
from idefics2_kernels.catalog.criterion import worst_error
from idefics2_kernels.reference import attention as reference

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def kernel() -> Any:
    return load_module(
        "gpu.gluon_compat", "attention.warp_specialized", "attention.flash_attention_hopper"
    )


CASES: list[dict[str, Any]] = [
    {"lengths": (130, 1, 0, 67), "D": 72, "causal": False},
    {"lengths": (300,), "D": 128, "causal": True},
    {"lengths": (5, 129, 64), "D": 96, "causal": True, "window": 40},
    {"lengths": (257,), "D": 72, "causal": False, "window": 33},
    {"lengths": (193, 128), "D": 128, "causal": True, "window": 1},
    {"lengths": (256,), "D": 72, "causal": False},
    {"lengths": (400, 3), "D": 72, "causal": True, "window": 129},
]
OPTIONS: list[dict[str, int]] = [
    {},
    {"IN_TURN": 0},
    {"IN_TURN": 1, "BLOCK_N": 32, "BUFFERS": 3},
    {"IN_TURN": 1, "BLOCK_N": 64, "BUFFERS": 1},
]


@pytest.mark.parametrize(("case", "options"), [*product(CASES, OPTIONS)])
def test_kernel_in_the_emulator(
    case: dict[str, Any],
    options: dict[str, int],
    kernel: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths, D = case["lengths"], case["D"]
    T, H, H_KV = sum(lengths), 2, 1
    # With a few programs, each has several tiles
    monkeypatch.setattr(kernel, "num_sms", lambda _device: 2)
    config = kernel.launch_config
    monkeypatch.setattr(kernel, "launch_config", lambda n: replace(config(n), **options))
    wide = torch.randn(T + 2, H + 2 * H_KV, D).half()
    wide[0] = wide[-1] = float("nan")
    q, k, v = wide[1:-1].split((H, H_KV, H_KV), 1)
    masks = {"causal": case["causal"], "window": case.get("window")}
    cu_seqlens = cumulative(lengths, torch.device("cpu"))
    left = UNBOUNDED if masks["window"] is None else masks["window"] - 1
    right = 0 if masks["causal"] else left
    with guarded_allocations():
        out = torch.empty(T, H, D, dtype=torch.float16)
        kernel.flash_attention_hopper(
            q, k, v, cu_seqlens, max(lengths), out, left, right, base_two(None, D)
        )
    exact, same = (
        reference.flash_attention(
            q.to(dtype), k.to(dtype), v.to(dtype), cu_seqlens, max(lengths), **masks
        )
        for dtype in (torch.float64, torch.float16)
    )
    assert worst_error(out, same, exact) <= 1


def test_catalog_agrees_with_supported_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(spec for spec in CATALOG if spec.name == "flash_attention")
    monkeypatch.setattr(catalog, "on_hopper", lambda: False)
    assert not any(spec.only["plain"](case) for case in spec.cases)
    monkeypatch.setattr(catalog, "on_hopper", lambda: True)
    small = [case for case in spec.cases if 0 < sum(case.dims["lengths"]) < 1000]
    takes = []
    for case in small:
        inputs = spec.make_inputs(case, torch.device("cpu"))
        takes.append(flash_attention_hopper.supports(*(inputs[name] for name in ("q", "k", "v"))))
    assert takes == [spec.only["plain"](case) for case in small]
    assert any(takes)
    assert not all(takes)
