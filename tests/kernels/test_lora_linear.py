"""The product with a low-rank product beside it, apart from parity: launches, equal bits, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_kernels import REFERENCE, TRITON, TRITON_GRADIENTS
from idefics2_kernels import lora_linear as module
from idefics2_kernels.reference.nf4 import nf4_quantize


def inputs_of(
    device: torch.device, M: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    drawn = {
        "x": torch.randn(M, 64),
        "base": torch.randn(5, 64),
        "a": torch.randn(8, 64),
        "b": torch.randn(5, 8),
    }
    moved: dict[str, Any] = {name: t.to(device, dtype) for name, t in drawn.items()}
    return moved | {"scale": 2.0}


BAD: dict[str, tuple[str, Callable[[Tensor], Any], type[Exception], str]] = {
    "scalar": ("x", lambda t: t[0, 0], ValueError, "x must have an axis"),
    "x-dtype": ("x", Tensor.int, TypeError, "x must be bfloat16"),
    "x-columns": ("x", lambda t: t[:, :-1], ValueError, r"base must have shape \(\*, 63\), got \(5, 64\)"),
    "x-strides": ("x", lambda t: t.repeat_interleave(2, 1)[:, ::2], ValueError, "x must have a cont"),
    "base-dtype": ("base", Tensor.half, TypeError, "base must be float32, got float16"),
    "base-axes": ("base", lambda t: t[0], ValueError, r"base must have shape \(\*, 64\), got \(64,\)"),
    "base-strides": (
        "base", lambda t: t.t().contiguous().t(), ValueError, "base must have a contiguous last axis"
    ),
    "nf4-dtype": (
        "base", lambda t: nf4_quantize(t.half()), TypeError, "base must be float32, got float16"
    ),
    "nf4-columns": (
        "base", lambda t: nf4_quantize(t[:, 1:]), ValueError, r"base must have shape \(\*, 64\)"
    ),
    "a-columns": ("a", lambda t: t[:, :-1], ValueError, r"a must have shape \(\*, 64\)"),
    "a-dtype": ("a", Tensor.half, TypeError, "a must be float32"),
    "a-strides": ("a", lambda t: t.t().contiguous().t(), ValueError, "a must have a contiguous"),
    "b-rank": ("b", lambda t: t[:, :-1], ValueError, r"b must have shape \(5, 8\), got \(5, 7\)"),
    "b-rows": ("b", lambda t: t[:-1], ValueError, r"b must have shape \(5, 8\), got \(4, 8\)"),
    "b-dtype": ("b", Tensor.half, TypeError, "b must be float32"),
    "b-strides": ("b", lambda t: t.t().contiguous().t(), ValueError, "b must have a contiguous"),
    "b-device": ("b", lambda t: t.to("meta"), ValueError, "b must be on"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name: str, device: torch.device) -> None:
    argument, change, error, message = BAD[name]
    inputs = inputs_of(device)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(error, match=message):
        TRITON.lora_linear(**inputs)


def test_wrong_bias_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"bias must have shape \(5\), got \(4,\)"):
        TRITON.lora_linear(**inputs_of(device), bias=torch.zeros(4, device=device))


@pytest.mark.parametrize("M", [3, 20])
def test_inputs_are_not_changed(M: int, device: torch.device) -> None:
    inputs = inputs_of(device, M)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    TRITON.lora_linear(**inputs)
    for name, was in before.items():
        assert torch.equal(inputs[name], was), name


@pytest.mark.parametrize("M", [1, 3, 16, 20])
def test_change_of_zero_leaves_the_product(M: int, device: torch.device) -> None:
    """The ranks that pad a change add nothing, not even to the last bit."""
    inputs = inputs_of(device, M, torch.bfloat16)
    inputs["b"].zero_()
    expected = TRITON.linear(inputs["x"], inputs["base"])
    assert torch.equal(TRITON.lora_linear(**inputs), expected)
    base = nf4_quantize(inputs["base"])
    expected = TRITON.nf4_matmul(inputs["x"], base)
    assert torch.equal(TRITON.lora_linear(**{**inputs, "base": base}), expected)


def test_row_of_few_rows_does_not_depend_on_other_rows(device: torch.device) -> None:
    inputs = inputs_of(device, 16, torch.bfloat16)
    whole = TRITON.lora_linear(**inputs)
    assert torch.equal(TRITON.lora_linear(**{**inputs, "x": inputs["x"][5:6]}), whole[5:6])


@pytest.mark.parametrize("M", [2, 20])
def test_projections_side_by_side_are_one_product(M: int, device: torch.device) -> None:
    """Changes of several projections are one change whose b is block-diagonal."""
    parts = [inputs_of(device, M) for _ in range(2)]
    x = parts[0]["x"]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("base", "a")}
    b = torch.block_diag(*(part["b"] for part in parts))
    ours = TRITON.lora_linear(x, **joined, b=b, scale=2.0)
    apart = [REFERENCE.lora_linear(**{**part, "x": x}) for part in parts]
    torch.testing.assert_close(ours, torch.cat(apart, -1), rtol=1e-4, atol=1e-4)


def test_leading_axes_are_kept(device: torch.device) -> None:
    inputs = inputs_of(device, 6)
    rows = TRITON.lora_linear(**inputs)
    for shape in ((2, 3), (6, 1), (1, 2, 3)):
        ours = TRITON.lora_linear(**{**inputs, "x": inputs["x"].view(*shape, 64)})
        assert torch.equal(ours, rows.view(*shape, 5))
    assert TRITON.lora_linear(**{**inputs, "x": inputs["x"][0]}).shape == (5,)


@pytest.mark.parametrize("M", [1, 16, 17, 5000])
@pytest.mark.parametrize("R", [1, 4, 16, 24, 64, 65, 192])
def test_launch_covers_the_rank(M: int, R: int) -> None:
    config = module.launch_config(M, R)
    assert 16 <= config.BLOCK_R <= 64
    assert min(R, 64) <= config.BLOCK_R


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 40])
def test_graph_replays_the_same_bits(M: int, device: torch.device) -> None:
    inputs = inputs_of(device, M, torch.bfloat16)
    expected = TRITON.lora_linear(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = TRITON.lora_linear(**inputs)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


BAD_GRADIENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scalar": ({"dy": torch.tensor(1.0)}, ValueError, "dy must have an axis"),
    "dy-dtype": ({"dy": torch.zeros(2, 5).int()}, TypeError, "dy must be bfloat16"),
    "dy-strides": ({"dy": torch.zeros(5, 2).t()}, ValueError, "dy must have a contiguous"),
    "no-x": ({"x": None}, ValueError, "x must be given with pair_grad, got None"),
    "x-rows": ({"x": torch.zeros(3, 64)}, ValueError, r"x must have shape \(2, 64\)"),
    "x-dtype": ({"x": torch.zeros(2, 64).half()}, TypeError, "x must be float32"),
    "base": ({"base": torch.zeros(5, 63)}, ValueError, r"base must have shape \(5, 64\)"),
    "base-dtype": ({"base": torch.zeros(5, 64).half()}, TypeError, "base must be float32"),
    "a-dtype": ({"a": torch.zeros(8, 64).half()}, TypeError, "a must be float32"),
    "a-axes": ({"a": torch.zeros(64)}, ValueError, r"a must have shape \(\*, \*\)"),
    "b-rank": ({"b": torch.zeros(5, 7)}, ValueError, r"b must have shape \(5, 8\)"),
    "b-device": ({"b": torch.zeros(5, 8, device="meta")}, ValueError, "b must be on"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_wrong_arguments_of_the_gradient_are_refused(name: str, device: torch.device) -> None:
    changes, error, message = BAD_GRADIENTS[name]
    moved = {
        key: value if value is None or value.is_meta else value.to(device)
        for key, value in changes.items()
    }
    inputs = inputs_of(device) | {"dy": torch.zeros(2, 5, device=device)} | moved
    with pytest.raises(error, match=message):
        TRITON_GRADIENTS.lora_linear(**inputs, pair_grad=True)
