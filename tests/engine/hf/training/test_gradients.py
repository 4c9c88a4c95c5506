"""Gradients of transformers' class on operations with gradients: their values, and who computes."""

import copy
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from hf_models import MIXED, batch, build_own, build_peer, counted, counted_gradients, labeled
from idefics2_engine.hf import accelerate_model
from idefics2_engine.hf.operations import KERNELS
from idefics2_kernels import (
    REFERENCE,
    REFERENCE_GRADIENTS,
    TRITON,
    TRITON_GRADIENTS,
    MissingOperationError,
)

TEXT_LAYERS, VISION_LAYERS, PERCEIVER_LAYERS = 3, 2, 2
# The true gradient of these is zero
ZERO = "vision_model.encoder.layers.{}.self_attn.k_proj.bias"
TARGETS = r".*(text_model|modality_projection|perceiver_resampler).*(q|v|gate|down)_proj$"


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step of training, and the gradients of all parameters that have one."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    zero = [ZERO.format(layer) for layer in range(VISION_LAYERS)]
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not name.endswith(tuple(zero))
    }
    return loss.detach(), found


def distances(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of each gradient, relative to its largest value."""
    assert got.keys() == exact.keys()
    return {
        name: float((got[name].double() - wanted).abs().max() / wanted.abs().max())
        for name, wanted in exact.items()
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_transformers(side: str) -> None:
    peer = build_peer(MIXED)
    calls: Counter[str] = Counter()
    own = accelerate_model(
        build_own(peer, MIXED), counted(REFERENCE, calls), counted_gradients(calls)
    )
    inputs = labeled(batch(MIXED, side))
    wanted, theirs = gradients(peer, inputs)
    loss, ours = gradients(own, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0.0)
    assert len(ours) == 90
    assert max(distances(ours, theirs).values()) <= 1e-5
    layers = TEXT_LAYERS + VISION_LAYERS
    assert calls == {
        "flash_attention": layers,
        "flash_attention backward": layers,
        "perceiver_attention": PERCEIVER_LAYERS,
        "perceiver_attention backward": PERCEIVER_LAYERS,
        "rotary": TEXT_LAYERS,
        "rotary backward": TEXT_LAYERS,
        "silu_mul": TEXT_LAYERS + PERCEIVER_LAYERS + 1,
        "silu_mul backward": TEXT_LAYERS + PERCEIVER_LAYERS + 1,
        "gelu_tanh": VISION_LAYERS,
        "gelu_tanh backward": VISION_LAYERS,
        "layer_norm": 2 * VISION_LAYERS + 1,
        "layer_norm backward": 2 * VISION_LAYERS + 1,
        "rms_norm": TEXT_LAYERS + 1 + 3 * PERCEIVER_LAYERS + 1,
        "add_rms_norm": TEXT_LAYERS,
        "rms_norm backward": 2 * TEXT_LAYERS + 1 + 3 * PERCEIVER_LAYERS + 1,
        "linear_cross_entropy backward": 1,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_distance_from_float64_in_16_bits(dtype: torch.dtype) -> None:
    peer = build_peer(MIXED).to(dtype)
    own = build_own(peer, MIXED)
    accelerate_model(own)
    inputs = labeled(batch(MIXED))
    _, exact = gradients(copy.deepcopy(peer).double(), inputs)
    _, theirs = gradients(peer, inputs)
    _, ours = gradients(own, inputs)
    wanted, got = distances(theirs, exact), distances(ours, exact)
    for name, distance in got.items():
        # A single rounding may be lucky, but not those of all parameters
        assert distance <= 2 * (wanted[name] + torch.finfo(dtype).eps), name
    assert sum(got.values()) <= 1.1 * sum(wanted.values())


@pytest.mark.long
def test_kernels(device: torch.device) -> None:
    peer = build_peer(MIXED)
    own = accelerate_model(build_own(peer, MIXED).to(device), TRITON, KERNELS)
    inputs = labeled(batch(MIXED))
    _, theirs = gradients(peer, inputs)
    _, ours = gradients(own, {name: tensor.to(device) for name, tensor in inputs.items()})
    found = distances({name: tensor.cpu() for name, tensor in ours.items()}, theirs)
    assert max(found.values()) <= 1e-5


@pytest.mark.parametrize("needs_inputs", [False, True], ids=["plain", "inputs-need-gradients"])
def test_adapters_leave_frozen_parts_without_history(needs_inputs: bool) -> None:
    peer = build_peer(MIXED)
    calls: Counter[str] = Counter()
    own = accelerate_model(
        build_own(peer, MIXED), counted(REFERENCE, calls), counted_gradients(calls)
    )
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    inputs = labeled(batch(MIXED))
    results = []
    for model in (peer, own):
        torch.manual_seed(0)
        model.add_adapter(config)
        if needs_inputs:
            model.enable_input_require_grads()
        results.append(gradients(model, inputs))
    (wanted, theirs), (loss, ours) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0.0)
    assert all("lora" in name for name in ours)
    # Adapters that were not trained are large, and so are the sums' roundings
    assert max(distances(ours, theirs).values()) <= 2e-5
    # The vision tower is computed by the operations and has no gradient
    assert calls["layer_norm"] == 2 * VISION_LAYERS + 1
    assert calls["layer_norm backward"] == calls["gelu_tanh backward"] == 0
    assert calls["flash_attention"] == TEXT_LAYERS + VISION_LAYERS
    assert calls["flash_attention backward"] == TEXT_LAYERS
    assert calls["perceiver_attention backward"] == PERCEIVER_LAYERS


def test_frozen_weights_keep_no_activation() -> None:
    own = accelerate_model(build_own(build_peer(MIXED), MIXED))
    mlp = own.model.text_model.layers[0].mlp.requires_grad_(False)
    x = torch.randn(7, 64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(x)
    weights = [parameter.shape for parameter in mlp.parameters()]
    activations = [tensor.shape for tensor in kept if tensor.shape not in weights]
    activations = [shape for shape in activations if shape[::-1] not in weights]
    # What silu_mul was given, and nothing else
    assert activations == [(7, 2 * 88)]


def test_a_gradient_that_is_missing_is_named() -> None:
    missing = replace(REFERENCE_GRADIENTS, perceiver_attention=TRITON_GRADIENTS.perceiver_attention)
    own = accelerate_model(build_own(build_peer(MIXED), MIXED), REFERENCE, missing)
    with pytest.raises(MissingOperationError, match="perceiver_attention"):
        gradients(own, labeled(batch(MIXED)))


def test_operations_without_gradients_leave_training_to_transformers() -> None:
    peer = build_peer(MIXED)
    calls: Counter[str] = Counter()
    own = build_own(peer, MIXED, counted(REFERENCE, calls))
    inputs = labeled(batch(MIXED))
    _, theirs = gradients(peer, inputs)
    _, ours = gradients(own, inputs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not calls


def test_a_model_that_trained_can_be_pickled() -> None:
    own = accelerate_model(build_own(build_peer(MIXED), MIXED))
    inputs = labeled(batch(MIXED))
    _, wanted = gradients(own, inputs)
    _, got = gradients(pickle.loads(pickle.dumps(own)), inputs)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_autocast_to_the_dtype_of_the_model() -> None:
    peer = build_peer(MIXED).bfloat16()
    calls: Counter[str] = Counter()
    own = accelerate_model(
        build_own(peer, MIXED), counted(REFERENCE, calls), counted_gradients(calls)
    )
    inputs = labeled(batch(MIXED))
    _, wanted = gradients(own, inputs)
    without = calls.copy()
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        _, got = gradients(own, inputs)
    assert calls == without
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
