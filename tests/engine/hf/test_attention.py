"""The registered attention and its mask against transformers' ``sdpa``."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from hf_models import LOOPED, MIXED, batch, build_own, build_peer, kept_logits, worst_row
from idefics2_engine.hf.attention import NAME, attend, left_padding, make_mask
from idefics2_engine.hf.packed_rows import PackedRows
from idefics2_kernels import REFERENCE, TRITON, Ops
from oracle import CASES, TinyCase

BY_NAME = {case.name: case for case in CASES}
TINY = TinyCase(
    "two-sizes",
    (((28, 42),), ((42, 28), (14, 14))),
    (4, 6),
    vision={"num_hidden_layers": 1},
    perceiver={"resampler_depth": 1},
    text={"num_hidden_layers": 2, "sliding_window": 5},
)


def assert_as_close_as_eager(
    case: TinyCase, side: str, ops: Ops, device: torch.device | str = "cpu"
) -> None:
    inputs = {name: tensor.to(device) for name, tensor in batch(case, side).items()}
    peer = build_peer(case).to(device)
    wanted = kept_logits(peer, inputs)
    got = kept_logits(build_own(peer, case, ops).to(device), inputs)
    peer.set_attn_implementation("eager")
    eager = kept_logits(peer, inputs)
    assert (got - wanted).abs().max() <= 2 * (eager - wanted).abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_mixed_sizes(side: str) -> None:
    assert_as_close_as_eager(MIXED, side, REFERENCE)


def test_logits_of_mixed_sizes_on_the_kernels(device: torch.device) -> None:
    assert_as_close_as_eager(TINY, "left", TRITON, device)


@pytest.mark.parametrize(
    "name",
    ["row-without-image", "no-image", "splitting", "window-of-one", "no-window", "multi-query"],
)
def test_logits_of_other_batches(name: str) -> None:
    assert_as_close_as_eager(BY_NAME[name], "left", REFERENCE)


def test_without_the_registered_mask_padding_is_attended_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of the tests above: transformers says nothing about the missing mask."""
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    with pytest.raises(AssertionError):
        assert_as_close_as_eager(MIXED, "left", REFERENCE)


@pytest.mark.parametrize("case", [MIXED, BY_NAME["head-dims-72-96-128"]], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_are_as_close_to_float64_as_transformers(
    dtype: torch.dtype, case: TinyCase, device: torch.device
) -> None:
    inputs = {name: tensor.to(device) for name, tensor in batch(case).items()}
    peer = build_peer(case, dtype).to(device)
    theirs = kept_logits(peer, inputs)
    # On a GPU these are the kernels, though the model was patched before it was moved
    ours = kept_logits(build_own(peer, case, None).to(device), inputs)
    exact = kept_logits(peer.double(), inputs)
    assert worst_row(ours, exact) <= 2 * (worst_row(theirs, exact) + torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "how",
    [{"cache_implementation": "static"}, {"cache_implementation": "dynamic"}, {"use_cache": False}],
    ids=["static-cache", "transformers-cache", "without-cache"],
)
def test_generated_tokens_equal_transformers(how: dict[str, Any]) -> None:
    """With the cache of this package they do as well (``test_paged_cache``)."""
    inputs, peer = batch(MIXED), build_peer(MIXED)
    wanted = peer.generate(**inputs, **LOOPED, **how)
    assert torch.equal(build_own(peer, MIXED).generate(**inputs, **LOOPED, **how), wanted)


def test_a_prompt_may_be_computed_in_two_parts() -> None:
    peer = build_peer(MIXED)
    own, inputs = build_own(peer, MIXED), batch(MIXED)
    del inputs["pixel_values"], inputs["pixel_attention_mask"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wanted = kept_logits(peer, inputs)
    with torch.no_grad():
        first = own(input_ids=ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
        past = first.past_key_values
        second = own(input_ids=ids[:, 20:], attention_mask=mask, past_key_values=past)
    got = torch.cat([first.logits, second.logits], 1)[mask.bool()]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_mask_is_plain_if_only_padding_and_the_future_are_masked() -> None:
    kept = torch.ones(1, 6, dtype=torch.bool)
    kept[0, 0] = False

    def shape(Q: int, **settings: Any) -> tuple[int, ...] | None:
        arguments = {"batch_size": 1, "device": kept.device, "attention_mask": kept} | settings
        mask = make_mask(q_length=Q, kv_length=6, **arguments)
        return None if mask is None else tuple(mask.shape)

    assert shape(6, allow_is_causal_skip=True) == (1, 6)
    assert shape(4, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) == (1, 6)
    assert shape(6, allow_is_causal_skip=True, attention_mask=torch.ones_like(kept)) is None
    assert shape(6, allow_is_causal_skip=False) == (1, 1, 6, 6)
    assert shape(6, allow_is_causal_skip=True, q_offset=3) == (1, 1, 6, 6)
    assert shape(2, allow_is_causal_skip=True, q_offset=4) == (1, 1, 2, 6)
    assert shape(4, allow_is_causal_skip=False) == (1, 1, 4, 6)


def test_left_padding_is_known_of_masks_that_hide_nothing_else() -> None:
    kept = torch.ones(2, 6, dtype=torch.bool)
    kept[0, :2] = False
    gap = kept.clone()
    gap[1, 3] = False

    def padding(Q: int, **settings: Any) -> list[int] | None:
        arguments = {"q_offset": 6 - Q, "attention_mask": kept, "device": kept.device} | settings
        mask = make_mask(batch_size=2, q_length=Q, kv_length=6, **arguments)
        assert mask is not None
        found = left_padding(mask)
        return None if found is None else found.tolist()

    assert padding(1) == padding(4) == [2, 0]
    assert padding(2, attention_mask=None) == [0, 0]
    # A window sees the last columns
    longer = torch.cat([torch.zeros_like(kept), kept], 1)
    assert padding(1, attention_mask=longer, kv_offset=6, q_offset=11) == [2, 0]
    # A query is padding, keys follow the queries, more is hidden, padding is behind a token
    assert padding(5) is None
    assert padding(2, q_offset=3) is None
    assert padding(2, q_offset=torch.tensor(4)) is None
    assert padding(2, allow_is_causal_skip=False) is None
    assert padding(2, attention_mask=gap) is None
    assert left_padding(torch.ones(2, 1, 1, 6, dtype=torch.bool)) is None


def test_masks_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    own = build_own(build_peer(MIXED), MIXED)
    made: list[tuple[int, ...]] = []
    real = PackedRows.from_mask

    def note(kept: Tensor) -> PackedRows:
        made.append(tuple(kept.shape))
        return real(kept)

    monkeypatch.setattr(PackedRows, "from_mask", note)
    inputs = batch(MIXED)
    kept_logits(own, inputs)
    # The tower, the projection, the perceiver's layers and the text model's
    assert made == [(4, 40)] * 3 + [tuple(inputs["input_ids"].shape)]
    # A changed mask of the caller's own is read again
    kept = torch.ones(1, 12, dtype=torch.bool)
    layer, states = own.model.vision_model.encoder.layers[0].self_attn, torch.randn(1, 12, 48)
    with torch.no_grad():
        before = layer(states, kept)[0]
        kept[0, 4:] = False
        assert not torch.allclose(layer(states, kept)[0][:, :4], before[:, :4])


def test_a_row_of_padding_alone_changes_no_other() -> None:
    own, inputs = build_own(build_peer(MIXED), MIXED), text_inputs(20)
    kept = torch.ones(2, 20, dtype=torch.int64)
    with torch.no_grad():
        wanted = own(**inputs).logits[1]
        kept[0] = 0
        got = own(**inputs, attention_mask=kept).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[1], wanted)


def test_packed_rows_move_with_their_tokens() -> None:
    rows = PackedRows.from_mask(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    moved = send_to_device((rows, torch.zeros(1)), "meta")[0]
    assert moved.places.device == moved.cu_seqlens.device == torch.device("meta")
    assert (moved.shape, moved.max_seqlen, moved.has_gaps) == ((2, 3), 2, False)


def text_inputs(length: int) -> dict[str, Any]:
    return {"input_ids": torch.arange(5, 5 + 2 * length).view(2, length), "use_cache": False}


def assert_equal_logits(inputs: dict[str, Any], kept: Any = ...) -> None:
    """Compare with ``sdpa``, and make sure that plain attention would be noticed."""
    peer = build_peer(MIXED)
    own = build_own(peer, MIXED)
    with torch.no_grad():
        got, wanted = own(**inputs).logits[kept], peer(**inputs).logits[kept]
        plain = own(input_ids=inputs["input_ids"]).logits[kept]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.1


def test_padding_between_tokens() -> None:
    # In packed rows the window of seven would reach over the gap
    kept = torch.ones(2, 20, dtype=torch.int64)
    kept[0, 5:8] = 0
    assert_equal_logits(text_inputs(20) | {"attention_mask": kept}, kept.bool())


def test_positions_of_packed_sequences() -> None:
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    assert_equal_logits(text_inputs(20) | {"position_ids": positions})


def test_mask_of_four_axes() -> None:
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    seen[10:, 3:6] = False
    assert_equal_logits(text_inputs(20) | {"attention_mask": seen.expand(2, 1, -1, -1)})


@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_layer_alone_takes_a_mask_of_two_axes(part: str) -> None:
    peer = build_peer(MIXED)
    own = build_own(peer, MIXED)
    kept = torch.ones(2, 12, dtype=torch.bool)
    kept[0, 9:] = False
    if part == "vision":
        layers = [m.model.vision_model.encoder.layers[0].self_attn for m in (own, peer)]
        calls: dict[str, Any] = {"hidden_states": torch.randn(2, 12, 48)}
        mask = kept[:, None, None]
    else:
        layers = [m.model.text_model.layers[0].self_attn for m in (own, peer)]
        angles = torch.randn(1, 12, 16)
        calls = {"hidden_states": torch.randn(2, 12, 64)}
        calls["position_embeddings"] = (angles.cos(), angles.sin())
        distance = torch.arange(12)[:, None] - torch.arange(12)
        mask = ((distance >= 0) & (distance < 7)) & kept[:, None, None]
    with torch.no_grad():
        wanted = layers[1](**calls, attention_mask=mask)[0][kept]
        for attention_mask in (kept, kept.long(), mask):
            got = layers[0](**calls, attention_mask=attention_mask)[0][kept]
            torch.testing.assert_close(got, wanted)
    # With gradients, ``sdpa`` gets a mask of its own
    torch.testing.assert_close(layers[0](**calls, attention_mask=kept)[0][kept], wanted)


def test_hidden_states_equal_transformers() -> None:
    inputs, peer = batch(MIXED), build_peer(MIXED)
    own, kept = build_own(peer, MIXED), batch(MIXED)["attention_mask"].bool()
    pictures = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
    with torch.no_grad():
        ours, theirs = (m(**inputs, output_hidden_states=True) for m in (own, peer))
        images = [m.get_image_features(**pictures, output_hidden_states=True) for m in (own, peer)]
    assert len(ours.hidden_states) == 4
    for got, wanted in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(got[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    # States of the tower keep the places of their patches
    for got, wanted in zip(images[0].hidden_states, images[1].hidden_states, strict=True):
        assert got.shape == wanted.shape
    torch.testing.assert_close(
        images[0].hidden_states[1][0, :20], images[1].hidden_states[1][0, :20]
    )


def test_attention_weights_are_refused() -> None:
    own = build_own(build_peer(MIXED), MIXED)
    with pytest.raises(ValueError, match="output_attentions"):
        own(**text_inputs(5), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        own.config.output_attentions = True
    own.set_attn_implementation("eager")
    with torch.no_grad():
        assert len(own(**text_inputs(5), output_attentions=True).attentions) == 3


def test_a_mask_of_another_shape_is_refused() -> None:
    layer = build_own(build_peer(MIXED), MIXED).model.text_model.layers[0].self_attn
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 6\).*got \(2, 5\)"):
        attend(layer, q, k, k, torch.ones(2, 5))


@pytest.mark.parametrize("part", ["vision", "text"])
def test_dropout_is_transformers(part: str) -> None:
    dropout = {"attention_dropout": 0.5}
    case = replace(MIXED, name="dropout", **{part: getattr(MIXED, part) | dropout})
    own, inputs = build_own(build_peer(case), case).train(), batch(case)
    first, second = (kept_logits(own, inputs) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(kept_logits(own.eval(), inputs), kept_logits(own, inputs))


def test_attention_of_others_gets_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with flash-attn, for which transformers makes masks of two axes as well."""
    masks = []

    def other(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask)
        return attend(module, q, k, v, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "other", other)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "other", flash_attention_mask)
    own = build_own(build_peer(MIXED), MIXED)
    wanted = kept_logits(own, batch(MIXED))
    own.set_attn_implementation("other")
    torch.testing.assert_close(kept_logits(own, batch(MIXED)), wanted, rtol=1e-4, atol=1e-4)
    assert len(masks) == 2 + 2 + 3
    assert all(isinstance(mask, Tensor) for mask in masks)
