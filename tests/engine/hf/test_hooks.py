"""What this package relies on in transformers, PEFT's targets and bitsandbytes, by name.

Each test fails if a release moves a hook. ``test_documented`` names the releases that they hold for.
"""

import inspect
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.mistral import modeling_mistral

from hf_models import LOOPED, MIXED, batch, build_own, build_peer
from idefics2_engine.hf import attention, blocks, nf4, paged_cache, vision_blocks
from idefics2_engine.hf.attention import NAME


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (blocks.MistralAttention, modeling_mistral.MistralAttention, [
            "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"]),
        (blocks.MistralRotaryEmbedding, modeling_mistral.MistralRotaryEmbedding, [
            "x", "position_ids"]),
        (blocks.MistralRMSNorm, modeling_mistral.MistralRMSNorm, ["hidden_states"]),
        (blocks.MistralMLP, modeling_mistral.MistralMLP, ["x"]),
        (blocks.Idefics2RMSNorm, modeling_idefics2.Idefics2RMSNorm, ["hidden_states"]),
        (blocks.Idefics2MLP, modeling_idefics2.Idefics2MLP, ["x"]),
        (vision_blocks.Idefics2VisionMLP, modeling_idefics2.Idefics2VisionMLP, ["hidden_states"]),
        (vision_blocks.Idefics2Encoder, modeling_idefics2.Idefics2Encoder, [
            "inputs_embeds", "attention_mask", "kwargs"]),
        (vision_blocks.Idefics2Connector, modeling_idefics2.Idefics2Connector, [
            "image_hidden_states", "attention_mask"]),
        (vision_blocks.Idefics2VisionTransformer, modeling_idefics2.Idefics2VisionTransformer, [
            "pixel_values", "patch_attention_mask", "kwargs"]),
        (vision_blocks.LayerNorm, nn.LayerNorm, ["input"]),
        (nf4.Linear4bit, Linear4bit, ["x"]),
    ],
    ids=lambda value: value.__module__.split(".")[0] if isinstance(value, type) else "",
)  # fmt: skip
def test_patched_forwards_have_these_arguments(
    ours: Any, theirs: Any, arguments: list[str]
) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    for kind in (ours, theirs):
        assert names(kind.forward) == ["self", *arguments]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("lazy_initialization", ["key_states", "value_states"]),
        ("update", ["key_states", "value_states", "args", "kwargs"]),
        ("reorder_cache", ["beam_idx"]),
    ],
)
def test_layers_of_caches_have_these_arguments(method: str, arguments: list[str]) -> None:
    for kind in (DynamicLayer, paged_cache.PagedLayer):
        assert names(getattr(kind, method)) == ["self", *arguments]


def test_layers_of_caches_have_no_other_methods() -> None:
    """A new one may change keys and values in a way that ``PagedLayer`` does not know."""
    known = {
        "lazy_initialization", "update", "reorder_cache", "reset", "crop", "offload", "prefetch",
        "batch_repeat_interleave", "batch_select_indices", "activate_past_recording",
        "get_mask_sizes", "get_seq_length", "get_max_length", "get_max_cache_shape",
    }  # fmt: skip
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        methods = inspect.getmembers(kind, inspect.isfunction)
        assert {name for name, _ in methods if not name.startswith("_")} <= known


def test_caches_have_a_layer_for_each_of_the_model() -> None:
    layers: Any = DynamicCache(config=MIXED.config()).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer] * 3
    assert {layer.sliding_window for layer in layers} == {7}
    assert {layer.cumulative_length for layer in layers} == {0}
    assert {layer.record_past for layer in layers} == {False}


def test_generate_prepares_its_cache_in_a_method_of_transformers() -> None:
    theirs: Any = transformers.Idefics2ForConditionalGeneration
    ours = vars(paged_cache.Idefics2ForConditionalGeneration)
    (hook,) = (name for name, value in ours.items() if inspect.isfunction(value))
    assert names(getattr(theirs, hook))[:3] == ["self", "generation_config", "model_kwargs"]
    config = theirs(MIXED.config()).generation_config
    assert config.cache_implementation is None
    assert not config.is_assistant
    arguments: dict[str, Any] = {}
    with torch.no_grad():
        getattr(build_own(build_peer(MIXED), MIXED), hook)(config, arguments, None, 1, 8)
    assert type(arguments["past_key_values"]) is paged_cache.PagedCache


def test_masks_are_asked_for_with_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def look(**arguments: Any) -> Any:
        calls.append(arguments)
        return attention.make_mask(**arguments)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, look)
    own = build_own(build_peer(MIXED), MIXED)
    own.generate(**batch(MIXED), **LOOPED | {"max_new_tokens": 3})
    images, prompt, first, second = calls[-4:]
    assert images["allow_is_bidirectional_skip"] is True
    # The window is seven
    for call, q_length, q_offset, kv_length, kv_offset in (
        (prompt, 27, 0, 27, 0),
        (first, 1, 27, 7, 21),
        (second, 1, 28, 7, 22),
    ):
        assert call["allow_is_causal_skip"] is True
        assert (call["q_length"], call["q_offset"]) == (q_length, q_offset)
        assert (call["kv_length"], call["kv_offset"]) == (kv_length, kv_offset)
        assert call["attention_mask"].shape == (3, q_offset + q_length)
        assert call["attention_mask"].dtype is torch.bool


def test_every_tower_calls_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any, Any]] = []

    def look(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        assert kwargs["scaling"] == q.shape[3] ** -0.5
        assert kwargs["dropout"] == 0.0
        window = kwargs.get("sliding_window")
        calls.append((type(module).__name__, module.is_causal, window))
        return attention.attend(module, q, k, v, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, look)
    with torch.no_grad():
        build_own(build_peer(MIXED), MIXED)(**batch(MIXED))
    assert calls == (
        [("Idefics2VisionAttention", False, None)] * 2
        + [("Idefics2PerceiverAttention", False, None)] * 2
        + [("MistralAttention", True, 7)] * 3
    )


def test_notebook_targets_are_layers_of_these_names() -> None:
    """PEFT finds layers by their names (``test_nf4`` trains them)."""
    text = build_own(build_peer(MIXED), MIXED).model.text_model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert type(getattr(text.self_attn, name)) is nn.Linear
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert type(getattr(text.mlp, name)) is nn.Linear
