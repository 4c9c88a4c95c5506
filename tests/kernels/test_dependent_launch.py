"""Kernels that start before the previous one has ended compute the same."""

import pytest
import torch
from torch import Tensor

from idefics2_kernels import TRITON
from idefics2_kernels.gpu import dependent_launch

LAYERS = 8


def test_interpreter_has_no_dependent_launch(device: torch.device) -> None:
    if device.type == "cpu":
        assert dependent_launch.dependent_options() == {"IS_DEPENDENT": False}


def _blocks(x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Run MLP blocks one after another: split products, with norms and activations between them."""
    residual, branch = x, torch.zeros_like(x)
    for norm, gate_up, down in weights:
        normed, residual = TRITON.add_rms_norm(branch, residual, norm, 1e-5)
        branch = TRITON.linear(TRITON.silu_mul(TRITON.linear(normed, gate_up)), down)
    return branch + residual


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16])
def test_chain_of_kernels_gives_the_same_bits(
    M: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(M, 1024, device=device).bfloat16()
    weights = []
    for _ in range(LAYERS):
        gate_up = torch.randn(2 * 4096, 1024, device=device).bfloat16() / 32
        down = torch.randn(1024, 4096, device=device).bfloat16() / 64
        weights.append((torch.ones(1024, device=device).bfloat16(), gate_up, down))
    monkeypatch.setattr(dependent_launch, "ENABLED", False)
    expected = _blocks(x, weights)
    torch.cuda.synchronize()
    monkeypatch.setattr(dependent_launch, "ENABLED", True)
    assert torch.equal(_blocks(x, weights), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _blocks(x, weights)
    for _ in range(100):
        graph.replay()
        assert torch.equal(out, expected)
