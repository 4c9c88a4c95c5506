"""Training transformers' class on operations with gradients: loss, gradients, and who computes."""

import inspect
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_models import MIXED, batch, build_own, build_peer
from idefics2_engine.hf.accelerate import patch_blocks
from idefics2_engine.hf.operations import Operations
from idefics2_kernels import REFERENCE, REFERENCE_GRADIENTS, Gradients


def counted(calls: Counter[str]) -> Gradients:
    def count(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(REFERENCE_GRADIENTS, name)(*args, **kwargs)

        return call

    return replace(REFERENCE_GRADIENTS, **{f.name: count(f.name) for f in fields(Gradients)})


def inputs_with_labels() -> dict[str, Tensor]:
    inputs = batch(MIXED)
    ids = inputs["input_ids"]
    return inputs | {"labels": ids.masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("num_items", [None, 29])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_loss_and_gradients_equal_transformers(checkpointing: bool, num_items: int | None) -> None:
    peer = build_peer(MIXED)
    own = build_own(peer, MIXED)
    calls: Counter[str] = Counter()
    patch_blocks(own, Operations(REFERENCE, counted(calls)))
    inputs: dict[str, Any] = inputs_with_labels()
    if num_items is not None:
        inputs["num_items_in_batch"] = num_items
    losses = []
    for model in (peer, own):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(**inputs)
        out.loss.backward()
        losses.append(out.loss.item())
    assert out.logits is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, ours), theirs in zip(own.named_parameters(), peer.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            scale = max(float(theirs.grad.abs().max()), 1e-3)
            assert float((ours.grad - theirs.grad).abs().max()) <= 2e-5 * scale, name
    text: Any = MIXED.config().text_config
    layers = text.num_hidden_layers
    assert calls["flash_attention"] == calls["rotary"] == layers
    assert calls["rms_norm"] == 2 * layers + 1
    assert calls["silu_mul"] >= layers
    assert calls["linear_cross_entropy"] == 1


def test_logits_are_there_where_they_are_wanted() -> None:
    peer = build_peer(MIXED)
    own = build_own(peer, MIXED)
    patch_blocks(own, Operations(REFERENCE, REFERENCE_GRADIENTS))
    inputs = inputs_with_labels()
    assert own(**inputs).logits is not None
    own.train()
    assert own(**inputs).logits is None
    assert own(**inputs, return_logits=True).logits is not None
    with torch.no_grad():
        assert own(**inputs).logits is not None
    patch_blocks(own, Operations(REFERENCE))
    assert own(**inputs).logits is not None


def test_signature_is_that_of_transformers() -> None:
    # ``Trainer`` keeps the columns that the signature names
    own = build_own(build_peer(MIXED), MIXED)
    wanted = inspect.signature(transformers.Idefics2ForConditionalGeneration.forward).parameters
    assert list(inspect.signature(own.forward).parameters) == list(wanted)[1:]
