"""Operations with a gradient: autograd's results through ``differentiable``, and what it keeps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_kernels import (
    REFERENCE,
    REFERENCE_GRADIENTS,
    TRITON,
    TRITON_GRADIENTS,
    MissingOperationError,
    NoGradientError,
    Ops,
    differentiable,
)
from idefics2_kernels.backward import linear_cross_entropy as kernel
from idefics2_kernels.differentiable import linear_cross_entropy

JOINED = differentiable(REFERENCE, REFERENCE_GRADIENTS)
KERNELS = differentiable(TRITON, TRITON_GRADIENTS)
Call = Callable[..., Tensor | tuple[Tensor, ...]]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention(causal: bool, window: int | None) -> Callable[[Ops], Call]:
    return lambda ops: (
        lambda q, k, v: ops.flash_attention(
            q, k, v, offsets(5, 0, 1, 6), 6, causal=causal, window=window
        )
    )


def rotary(ops: Ops) -> Call:
    angles = torch.linspace(0, 3, 7, dtype=torch.float64)[:, None] * torch.ones(1, 4)
    table = torch.cat([angles.cos(), angles.sin()], 1)
    return lambda q, k: ops.rotary(q, k, torch.tensor([3, 0, 6, 1]), table)


def low_rank(ops: Ops) -> Call:
    base, bias = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (20, 4))
    return lambda x, a, b: ops.lora_linear(x, base.view(4, 5), a, b, 1.5, bias)


def perceiver(ops: Ops) -> Call:
    attend: Any = ops.perceiver_attention
    return lambda *inputs: attend(*inputs, offsets(4, 3), 4)


# The function of tensors that a table of operations has, and the shapes of the tensors.
CALLS: dict[str, tuple[Callable[[Ops], Call], list[tuple[int, ...]]]] = {
    "linear": (lambda ops: ops.linear, [(2, 3, 5), (4, 5), (4,)]),
    "linear_gelu": (lambda ops: ops.linear_gelu, [(3, 5), (4, 5), (4,)]),
    "lora_linear": (low_rank, [(2, 3, 5), (2, 5), (4, 2)]),
    "rms_norm": (lambda ops: lambda x, w: ops.rms_norm(x, w, 1e-2), [(2, 3, 8), (8,)]),
    "add_rms_norm": (
        lambda ops: lambda x, y, w: ops.add_rms_norm(x, y, w, 1e-2),
        [(3, 8), (3, 8), (8,)],
    ),
    "layer_norm": (
        lambda ops: lambda x, w, b: ops.layer_norm(x, w, b, 1e-2),
        [(3, 8), (8,), (8,)],
    ),
    "add_layer_norm": (
        lambda ops: lambda x, y, w, b: ops.add_layer_norm(x, y, w, b, 1e-2),
        [(3, 8), (3, 8), (8,), (8,)],
    ),
    "silu_mul": (lambda ops: ops.silu_mul, [(3, 8)]),
    "gelu_tanh": (lambda ops: ops.gelu_tanh, [(3, 8)]),
    "rotary": (rotary, [(4, 3, 8), (4, 1, 8)]),
    "flash_attention": (attention(False, None), [(12, 2, 4), (12, 2, 4), (12, 2, 4)]),
    "flash_attention-causal": (attention(True, None), [(12, 4, 4), (12, 2, 4), (12, 2, 4)]),
    "flash_attention-window": (attention(True, 2), [(12, 4, 4), (12, 1, 4), (12, 1, 4)]),
    "perceiver_attention": (
        perceiver,
        [(2, 3, 4, 8), (7, 2, 8), (7, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8)],
    ),
}


def gradients(ops: Ops, name: str, used: int | None = None) -> list[Tensor | None]:
    """Return the gradients of a call, whose results (or result number ``used``) have a loss."""
    torch.manual_seed(0)
    make, shapes = CALLS[name]
    leaves = [draw(*shape).requires_grad_() for shape in shapes]
    found = make(ops)(*leaves)
    results = found if isinstance(found, tuple) else (found,)
    chosen = results if used is None else (results[used],)
    loss = sum(((result * draw(*result.shape)).sum() for result in chosen), torch.zeros(()))
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_autograds(name: str) -> None:
    for got, wanted in zip(gradients(JOINED, name), gradients(REFERENCE, name), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm", "rotary"])
def test_a_result_that_nothing_uses_has_no_gradient(name: str, used: int) -> None:
    got, wanted = gradients(JOINED, name, used), gradients(REFERENCE, name, used)
    for mine, other in zip(got, wanted, strict=True):
        # What has no gradient of its own may be zeros or None.
        if mine is None or other is None:
            assert not any(bool(one.any()) for one in (mine, other) if one is not None)
        else:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def kept(call: Callable[[], object]) -> list[Tensor]:
    """Return the tensors that ``call`` keeps for the backward pass."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


def test_a_frozen_weight_keeps_no_activation() -> None:
    x, weight = draw(3, 5).requires_grad_(), draw(4, 5)
    assert [tensor.data_ptr() for tensor in kept(lambda: JOINED.linear(x, weight))] == [
        weight.data_ptr()
    ]
    weight.requires_grad_()
    assert x.data_ptr() in {t.data_ptr() for t in kept(lambda: JOINED.linear(x, weight))}


def test_nf4_keeps_nothing() -> None:
    weight = REFERENCE.nf4_quantize(torch.randn(64, 64))
    x = torch.randn(3, 64, requires_grad=True)
    assert kept(lambda: JOINED.nf4_matmul(x, weight)) == []
    JOINED.nf4_matmul(x, weight).sum().backward()
    wanted = REFERENCE.nf4_dequantize(weight).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, wanted)


def test_projections_that_share_an_input_keep_it_once() -> None:
    x, base = torch.randn(3, 64, requires_grad=True), REFERENCE.nf4_quantize(torch.randn(64, 64))
    pairs = [(torch.randn(2, 64), torch.randn(64, 2)) for _ in range(3)]

    def project() -> list[Tensor]:
        return [JOINED.lora_linear(x, base, a, b, 2.0) for a, b in pairs]

    matrices = {matrix.data_ptr() for pair in pairs for matrix in pair}
    assert {tensor.data_ptr() for tensor in kept(project)} == matrices
    for a, _ in pairs:
        a.requires_grad_()
    # The input has one place in memory, and nothing of the outputs' size is kept
    assert {tensor.data_ptr() for tensor in kept(project)} == matrices | {x.data_ptr()}


def test_low_rank_gradients_beside_nf4() -> None:
    torch.manual_seed(0)
    base = REFERENCE.nf4_quantize(torch.randn(64, 64))
    results = []
    for ops in (REFERENCE, JOINED):
        torch.manual_seed(1)
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, 64), (2, 64), (64, 2))]
        x, a, b = leaves
        ops.lora_linear(x, base, a, b, 2.0).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)


def test_a_second_derivative_raises() -> None:
    x = draw(3, 8).requires_grad_()
    with pytest.raises(NoGradientError, match="create_graph must be False, got True"):
        torch.autograd.grad(JOINED.silu_mul(x).sum(), x, create_graph=True)


def test_missing_gradients_raise_by_name(device: torch.device) -> None:
    inputs = [torch.randn(shape, device=device) for shape in CALLS["perceiver_attention"][1]]
    inputs[0].requires_grad_()
    out: Any = perceiver(KERNELS)(*inputs)
    with pytest.raises(
        MissingOperationError, match="TRITON_GRADIENTS has no 'perceiver_attention'"
    ):
        out.sum().backward()


def test_what_has_no_gradient_raises_by_name() -> None:
    weight = REFERENCE.nf4_quantize(torch.randn(64, 64))
    x, vector = torch.randn(3, 64), torch.randn(64, requires_grad=True)
    with pytest.raises(NoGradientError, match="'nf4_matmul' has no gradient of bias"):
        JOINED.nf4_matmul(x, weight, vector)
    pair = torch.randn(2, 64), torch.randn(64, 2)
    with pytest.raises(NoGradientError, match="'lora_linear' has no gradient of bias"):
        JOINED.lora_linear(x, weight, *pair, 1.0, vector)
    dense = torch.randn(64, 64, requires_grad=True)
    with pytest.raises(NoGradientError, match="'lora_linear' has no gradient of base"):
        JOINED.lora_linear(x, dense, *pair, 1.0)
    with pytest.raises(NoGradientError, match="'gelu_tanh' has no gradient of bias"):
        JOINED.gelu_tanh(x, vector)
    with pytest.raises(NoGradientError, match="TRITON's 'patches' has no gradient"):
        KERNELS.patches(x.requires_grad_(), *[None] * 7)  # type: ignore[arg-type]


def test_other_operations_are_those_of_the_table() -> None:
    assert JOINED.sample is REFERENCE.sample
    assert JOINED.paged_attention is REFERENCE.paged_attention


@pytest.mark.parametrize("num_items", [None, 11])
@pytest.mark.parametrize("labeled", ["all", "some", "one"])
def test_loss_is_that_of_whole_logits(labeled: str, num_items: int | None) -> None:
    torch.manual_seed(0)
    hidden, weight = draw(9, 5).requires_grad_(), draw(13, 5).requires_grad_()
    targets = torch.randint(13, (9,))
    targets[{"all": 9, "some": 4, "one": 1}[labeled] :] = -100
    count = int((targets >= 0).sum())

    def whole() -> Tensor:
        logits = hidden @ weight.t()
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / (num_items or count)

    loss = linear_cross_entropy(REFERENCE_GRADIENTS, hidden, weight, targets, num_items=num_items)
    torch.testing.assert_close(loss, whole())
    got = torch.autograd.grad(3 * loss, [hidden, weight])
    for mine, wanted in zip(got, torch.autograd.grad(3 * whole(), [hidden, weight]), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("table", [REFERENCE_GRADIENTS, TRITON_GRADIENTS], ids=["torch", "triton"])
def test_loss_without_targets_is_zero(table: Any, device: torch.device) -> None:
    hidden, weight = (torch.randn(rows, 16, device=device, requires_grad=True) for rows in (4, 9))
    loss = linear_cross_entropy(table, hidden, weight, torch.full((4,), -100, device=device))
    assert loss.item() == 0
    got = torch.autograd.grad(loss, [hidden, weight])
    assert not any(bool(one.any()) for one in got)


@pytest.mark.parametrize("weight_grad", [False, True])
def test_loss_in_several_chunks(
    weight_grad: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    torch.manual_seed(0)
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_WEIGHT"):
        monkeypatch.setattr(kernel, name, 1)
    assert kernel.chunk_rows(19, 4, weight_grad=weight_grad) == kernel.CHUNK_ROWS
    hidden, weight = (torch.randn(rows, 16, device=device) for rows in (300, 19))
    targets = torch.randint(19, (300,)).masked_fill(torch.rand(300) < 0.1, -100).to(device)
    got, wanted = (
        gradients.linear_cross_entropy(hidden, weight, targets, weight_grad=weight_grad)
        for gradients in (TRITON_GRADIENTS, REFERENCE_GRADIENTS)
    )
    torch.testing.assert_close(got, wanted)


def test_loss_of_a_frozen_head_computes_no_gradient_of_it() -> None:
    seen = []

    def loss(*args: Any, weight_grad: bool, **kwargs: Any) -> Any:
        seen.append(weight_grad)
        return REFERENCE_GRADIENTS.linear_cross_entropy(*args, weight_grad=weight_grad, **kwargs)

    table = replace(REFERENCE_GRADIENTS, linear_cross_entropy=loss)
    hidden, weight = draw(4, 5).requires_grad_(), draw(9, 5)
    linear_cross_entropy(table, hidden, weight, torch.arange(4)).backward()
    assert seen == [False]
    assert hidden.grad is not None
