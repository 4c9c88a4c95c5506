"""Gradient checkpointing: the bits without it, and attention that is computed once."""

from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from hf_models import MIXED, batch, build_own, build_peer, counted, counted_gradients, labeled
from idefics2_engine.hf import accelerate_model, vision_blocks
from idefics2_kernels import REFERENCE

LAYERS = 5

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def step(model: Any, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of a step, with checkpoints if there are ``settings``."""
    model.train()
    if settings:
        model.gradient_checkpointing_enable(settings)
    loss = model(**labeled(batch(MIXED))).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_and_calls(dtype: torch.dtype, use_reentrant: bool) -> None:
    peer = build_peer(MIXED).to(dtype)
    models, calls = [], [Counter[str](), Counter[str]()]
    for counter in calls:
        own = build_own(peer, MIXED)
        models.append(
            accelerate_model(own, counted(REFERENCE, counter), counted_gradients(counter))
        )
    wanted, plain = step(models[0])
    loss, checkpointed = step(models[1], use_reentrant=use_reentrant)
    assert torch.equal(loss, wanted)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name
    once, twice = calls
    assert once["flash_attention"] == twice["flash_attention"] == LAYERS
    # All other operations of a layer are computed again
    assert twice["add_rms_norm"] == 2 * once["add_rms_norm"]
    assert twice["gelu_tanh"] == 2 * once["gelu_tanh"]
    assert twice["silu_mul"] == 2 * once["silu_mul"]
    assert twice["perceiver_attention"] == 2 * once["perceiver_attention"]
    assert {k: n for k, n in twice.items() if "backward" in k} == {
        k: n for k, n in once.items() if "backward" in k
    }


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
def test_adapters_behind_a_frozen_tower(use_reentrant: bool) -> None:
    peer = build_peer(MIXED)
    config = peft.LoraConfig(
        r=2, target_modules=r".*(text_model|connector).*(k|down)_proj$", init_lora_weights=False
    )
    found = []
    for settings in ({}, {"use_reentrant": use_reentrant}):
        own = accelerate_model(build_own(peer, MIXED))
        torch.manual_seed(0)
        own.add_adapter(config)
        own.enable_input_require_grads()
        found.append(step(own, **settings))
    (wanted, plain), (loss, checkpointed) = found
    assert torch.equal(loss, wanted)
    assert len(plain) == 2 * (2 * 3 + 2 * 2 + 1)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_projection_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = build_peer(MIXED)
    own = accelerate_model(build_own(peer, MIXED))
    wanted, plain = step(own)
    own.zero_grad()
    # The pictures have 78 patches
    monkeypatch.setattr(vision_blocks, "TRAINED_ROWS", 20)
    loss, chunked = step(own)
    torch.testing.assert_close(loss, wanted)
    own.zero_grad()
    again, checkpointed = step(own, use_reentrant=False)
    assert torch.equal(again, loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(checkpointed[name], chunked[name]), name


def test_enabled_before_the_model_is_patched() -> None:
    calls: Counter[str] = Counter()
    peer = build_peer(MIXED)
    peer.gradient_checkpointing_enable({"use_reentrant": False})
    accelerate_model(peer, counted(REFERENCE, calls), counted_gradients(calls))
    step(peer)
    assert calls["flash_attention"] == LAYERS
    assert calls["add_rms_norm"] == 2 * 3


def test_a_second_backward_pass_reads_what_is_kept() -> None:
    calls: Counter[str] = Counter()
    own = build_own(build_peer(MIXED), MIXED)
    accelerate_model(own, counted(REFERENCE, calls), counted_gradients(calls))
    own.gradient_checkpointing_enable({"use_reentrant": False})
    loss = own.train()(**labeled(batch(MIXED))).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in own.named_parameters() if p.grad is not None}
    own.zero_grad()
    loss.backward()
    for name, gradient in first.items():
        assert torch.equal(own.get_parameter(name).grad, gradient), name
    assert calls["flash_attention"] == LAYERS


def test_steps_do_not_share_what_is_kept() -> None:
    own = accelerate_model(build_own(build_peer(MIXED), MIXED))
    own.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = labeled(batch(MIXED))
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 7
    own.train()
    # Both forward passes are before both backward passes
    losses = [own(**each).loss for each in (inputs, other)]
    together = torch.autograd.grad(losses[0] + losses[1], own.lm_head.weight)[0]
    apart = [torch.autograd.grad(own(**i).loss, own.lm_head.weight)[0] for i in (inputs, other)]
    torch.testing.assert_close(together, apart[0] + apart[1])


def test_without_gradients_nothing_is_kept() -> None:
    own = accelerate_model(build_own(build_peer(MIXED), MIXED))
    own.gradient_checkpointing_enable({"use_reentrant": False})
    own.train()
    inputs = batch(MIXED)
    with torch.no_grad():
        got = own(**inputs).logits
        wanted = own.eval()(**inputs).logits
    assert torch.equal(got, wanted)
