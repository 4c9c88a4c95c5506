"""The loss of a step of training without its logits, and when there are logits."""

import inspect
from typing import Any

import pytest
import torch
import transformers

from hf_models import MIXED, batch, build_own, build_peer, labeled
from idefics2_engine.hf import accelerate_model
from idefics2_kernels import REFERENCE


@pytest.fixture
def own() -> Any:
    return accelerate_model(build_own(build_peer(MIXED), MIXED)).train()


@pytest.mark.parametrize("num_items", [None, 29, torch.tensor(31)], ids=["mean", "int", "tensor"])
def test_equals_transformers(own: Any, num_items: Any) -> None:
    inputs = labeled(batch(MIXED))
    wanted = build_peer(MIXED).train()(**inputs, num_items_in_batch=num_items).loss
    out = own(**inputs, num_items_in_batch=num_items)
    assert out.logits is None
    torch.testing.assert_close(out.loss, wanted)


def test_rows_without_a_label_are_left_out(own: Any) -> None:
    seen: list[torch.Size] = []
    own.lm_head.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    inputs = labeled(batch(MIXED))
    inputs["labels"][:, :-2] = -100
    out = own(**inputs)
    out.loss.backward()
    assert seen == [own.lm_head.weight.shape]
    torch.testing.assert_close(out.loss, build_peer(MIXED)(**inputs).loss)


def test_without_any_label_the_loss_is_zero(own: Any) -> None:
    inputs = labeled(batch(MIXED))
    inputs["labels"].fill_(-100)
    loss = own(**inputs).loss
    loss.backward()
    assert loss == 0.0
    assert all(p.grad is None or not p.grad.any() for p in own.parameters())
    assert build_peer(MIXED)(**inputs).loss.isnan()


def test_logits_where_they_are_wanted(own: Any) -> None:
    inputs = labeled(batch(MIXED))
    assert own(**inputs).logits is None
    wanted = build_peer(MIXED)(**inputs)
    out = own(**inputs, return_logits=True)
    torch.testing.assert_close(out.logits, wanted.logits)
    torch.testing.assert_close(out.loss, wanted.loss)
    assert own(**batch(MIXED)).logits is not None
    with torch.no_grad():
        assert own(**inputs).logits is not None
    assert own.eval()(**inputs).logits is not None
    assert accelerate_model(own, REFERENCE).train()(**inputs).logits is not None


def test_what_needs_logits_gets_them(own: Any) -> None:
    inputs = labeled(batch(MIXED))
    shifted = inputs["labels"].roll(-1, 1)
    out = own(**inputs, shift_labels=shifted)
    torch.testing.assert_close(out.loss, build_peer(MIXED)(**inputs, shift_labels=shifted).loss)
    hook = own.lm_head.register_forward_hook(lambda *_: None)
    assert own(**inputs).logits is not None
    hook.remove()
    own.loss_function = lambda logits, **_: logits.sum()
    out = own(**inputs)
    assert out.loss == out.logits.sum()


def test_other_arguments_are_transformers(own: Any) -> None:
    inputs = labeled(batch(MIXED))
    loss, *rest = own(**inputs, return_dict=False, use_cache=False)
    torch.testing.assert_close(loss, own(**inputs).loss)
    # The features of the images alone
    assert len(rest) == 1
    assert len(own(**inputs, output_hidden_states=True).hidden_states) == 4
    ids = inputs.pop("input_ids")
    assert own(ids, **inputs).logits is None
    with pytest.raises(TypeError, match="multiple values"):
        own(ids, input_ids=ids, **inputs)


def test_signature_is_that_of_transformers(own: Any) -> None:
    # ``Trainer`` keeps the columns that the signature names
    wanted = inspect.signature(transformers.Idefics2ForConditionalGeneration.forward).parameters
    assert list(inspect.signature(own.forward).parameters) == list(wanted)[1:]
