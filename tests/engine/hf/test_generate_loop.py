"""What ``generate`` leaves to transformers' loop, and bad input."""

import copy
import logging
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation import streamers

from hf_models import GREEDY, MIXED, batch, build_own, build_peer, engine_of
from oracle import IMAGE_TOKEN


@pytest.fixture(scope="module")
def peer() -> Any:
    return build_peer(MIXED)


@pytest.fixture
def own(peer: Any) -> Any:
    model = build_own(peer, MIXED)
    model.generation_config = copy.deepcopy(peer.generation_config)
    model.generation_backend = "engine"
    return model


def penalize(ids: Tensor, scores: Tensor) -> Tensor:
    return scores - 1e3 * (torch.arange(scores.shape[-1]) % 2)


LOOP: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 3},
    "LogitsProcessor": {"logits_processor": [penalize]},
    "StoppingCriteria": {"stopping_criteria": [lambda ids, _: torch.tensor([False] * len(ids))]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7]},
    "output_scores": {"return_dict_in_generate": True, "output_scores": True},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "cache_implementation": {"cache_implementation": "static", "disable_compile": True},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "past_key_values": {"past_key_values": "new"},
    "max_time": {"max_time": 1e6},
}
NAMED = {
    "LogitsProcessor": "logits_processor",
    "StoppingCriteria": "stopping_criteria",
    "output_scores": "return_dict_in_generate",
    "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
    "max_time": "MaxTimeCriteria",
}


class TestTransformersLoop:
    @pytest.mark.parametrize("name", LOOP)
    def test_what_the_engine_has_not(self, name: str, peer: Any, own: Any) -> None:
        def asked() -> dict[str, Any]:
            values = GREEDY | LOOP[name]
            if "past_key_values" in values:
                values["past_key_values"] = transformers.DynamicCache(config=peer.config)
            return values

        def tokens(model: Any) -> Any:
            out = model.generate(**batch(MIXED), **asked())
            return getattr(out, "sequences", out).tolist()

        with pytest.raises(ValueError, match=NAMED.get(name, name)):
            own.generate(**batch(MIXED), **asked())
        assert engine_of(own) is None
        own.generation_backend = "auto"
        assert tokens(own) == tokens(peer)
        assert engine_of(own) is None

    @pytest.mark.parametrize("change", ["right-padding", "position_ids", "positions", "attention"])
    def test_inputs_and_models(self, change: str, peer: Any, own: Any) -> None:
        inputs, asked = batch(MIXED), dict(GREEDY)
        named = "padding"
        if change == "right-padding":
            inputs = batch(MIXED, "right")
        elif change == "position_ids":
            named = "position_ids"
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).repeat(3, 1)
        elif change == "positions":
            asked["max_new_tokens"], named = 250, "positions"
        else:
            own.set_attn_implementation("sdpa")
            named = "attn_implementation='sdpa'"
        with pytest.raises(ValueError, match=named):
            own.generate(**inputs, **asked)
        assert engine_of(own) is None
        asked |= GREEDY
        own.generation_backend = "auto"
        assert own.generate(**inputs, **asked).tolist() == peer.generate(**inputs, **asked).tolist()

    def test_the_log_says_why(self, own: Any, caplog: pytest.LogCaptureFixture) -> None:
        own.generation_backend = "auto"
        with caplog.at_level(logging.INFO, "idefics2_engine.hf.model"):
            own.generate(**batch(MIXED), **GREEDY, no_repeat_ngram_size=2)
        assert "NoRepeatNGramLogitsProcessor" in caplog.text

    def test_hooks_are_called(self, own: Any) -> None:
        calls = []
        own.model.text_model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=r"a hook of model\.text_model\.layers\.0\.mlp"):
            own.generate(**batch(MIXED), **GREEDY)
        own.generation_backend = "auto"
        own.generate(**batch(MIXED), **GREEDY)
        assert calls

    def test_hooks_of_transformers_do_nothing(self, own: Any) -> None:
        with torch.no_grad():
            own(**batch(MIXED), output_hidden_states=True)
        own.generate(**batch(MIXED), **GREEDY)

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_an_active_adapter(self, peer: Any, own: Any) -> None:
        plain = peer.generate(**batch(MIXED), **GREEDY).tolist()
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        wrapped: Any = peft.get_peft_model(own, config)
        with pytest.raises(ValueError, match="adapter"):
            wrapped.generate(**batch(MIXED), **GREEDY)
        with wrapped.disable_adapter():
            assert wrapped.generate(**batch(MIXED), **GREEDY).tolist() == plain
        own.generation_backend = "auto"
        adapted = wrapped.generate(**batch(MIXED), **GREEDY).tolist()
        assert adapted != plain
        own.generation_backend = "engine"
        wrapped.merge_adapter()
        assert wrapped.generate(**batch(MIXED), **GREEDY).tolist() == adapted
        wrapped.unmerge_adapter()
        with pytest.raises(ValueError, match="adapter"):
            wrapped.generate(**batch(MIXED), **GREEDY)

    def test_autocast(self, own: Any) -> None:
        with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
            own.generate(**batch(MIXED), **GREEDY)

    def test_unknown_backends(self, own: Any) -> None:
        with pytest.raises(ValueError, match=r"generation_backend must be .*, got 'vllm'"):
            own.generation_backend = "vllm"


class TestBadInput:
    """transformers' errors, where transformers checks."""

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens"),
            ({"max_new_token": 3}, "max_new_token"),
            ({"temperature": -1.0, "do_sample": True}, "temperature"),
            ({"bad_words_ids": [[-1]]}, "positive integers"),
            ({"stop_strings": ["a"]}, "tokenizer"),
        ],
        ids=["no-room", "unknown", "temperature", "bad-words", "no-tokenizer"],
    )
    def test_arguments(self, change: dict[str, Any], error: str, peer: Any, own: Any) -> None:
        own.generation_backend = "auto"
        raised = []
        for model in (peer, own):
            with pytest.raises(ValueError, match=error) as caught:
                model.generate(**batch(MIXED), **GREEDY | change)
            raised.append(str(caught.value))
        assert raised[0] == raised[1]

    def test_pictures_without_their_tokens(self, peer: Any, own: Any) -> None:
        inputs = batch(MIXED)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, 5)
        with pytest.raises(ValueError, match="5 image tokens for each of its 1 pictures, got 0"):
            own.generate(**inputs, **GREEDY)

    def test_a_failed_call_leaves_the_engine_usable(self, peer: Any, own: Any) -> None:
        class Broken(streamers.BaseStreamer):
            def put(self, value: Tensor) -> None:
                if value.numel() == 1:
                    raise KeyError("a caller's mistake")

            def end(self) -> None:
                pass

        inputs = {name: tensor[1:2] for name, tensor in batch(MIXED).items()}
        with pytest.raises(KeyError, match="a caller's mistake"):
            own.generate(**inputs, **GREEDY, streamer=Broken())
        assert (
            own.generate(**inputs, **GREEDY).tolist() == peer.generate(**inputs, **GREEDY).tolist()
        )
