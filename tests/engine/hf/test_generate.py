"""``generate`` on the engine: transformers' tokens, drawn ones, and the engine itself."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation import streamers

from hf_models import GREEDY, MIXED, batch, build_own, build_peer, engine_of
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.hf import Idefics2ForConditionalGeneration
from idefics2_kernels import TRITON
from oracle import IMAGE_TOKEN, TinyCase

TEXT = TinyCase("text-alone", ((),) * 3, (9, 17, 11), text={"sliding_window": 7})
# Rows of one length, and one picture each
EVEN = TinyCase("even-rows", (((56, 70),), ((28, 42),)), (9, 9))


@pytest.fixture(scope="module")
def peer() -> Any:
    return build_peer(MIXED)


@pytest.fixture
def own(peer: Any) -> Any:
    model = build_own(peer, MIXED)
    model.generation_config = copy.deepcopy(peer.generation_config)
    model.generation_backend = "engine"
    return model


def ends_of(peer: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Return a token that ends the first answer early, and the others later or never."""
    tokens = peer.generate(**inputs, **GREEDY)
    return [int(tokens[0, inputs["input_ids"].shape[1] + 3])]


class TestTokensOfTransformers:
    @pytest.mark.parametrize(
        "asked",
        [
            {},
            {"min_new_tokens": 6, "eos": True},
            {"eos": True},
            {"min_length": 30, "eos": True},
            {"max_length": 40, "max_new_tokens": None},
            {"max_new_tokens": None},
            {"bad_words_ids": "answers"},
        ],
        ids=["plain", "least", "end", "min-length", "max-length", "no-length", "bad-words"],
    )
    @pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
    def test_greedy(self, asked: dict[str, Any], peer: Any, own: Any) -> None:
        inputs = batch(MIXED)
        asked = GREEDY | asked
        if asked.pop("eos", False):
            asked["eos_token_id"] = ends_of(peer, inputs)
        if "bad_words_ids" in asked:
            answers = peer.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
            asked["bad_words_ids"] = [answers[0, :1].tolist(), answers[1, 2:4].tolist()]
        wanted = peer.generate(**inputs, **asked)
        got = own.generate(**inputs, **asked)
        assert engine_of(own) is not None
        assert got.dtype == wanted.dtype
        assert got.tolist() == wanted.tolist()

    @pytest.mark.parametrize("case", [TEXT, EVEN], ids=lambda case: case.name)
    def test_other_batches(self, case: TinyCase) -> None:
        peer = build_peer(case)
        own = build_own(peer, case)
        own.generation_backend = "engine"
        inputs = batch(case)
        assert (
            own.generate(**inputs, **GREEDY).tolist() == peer.generate(**inputs, **GREEDY).tolist()
        )

    def test_repetition_penalty(self) -> None:
        peer = build_peer(EVEN)
        own = build_own(peer, EVEN)
        own.generation_backend = "engine"
        asked = GREEDY | {"repetition_penalty": 1.7, "bad_words_ids": [[IMAGE_TOKEN]]}
        inputs = batch(EVEN)
        wanted = peer.generate(**inputs, **asked)
        assert own.generate(**inputs, **asked).tolist() == wanted.tolist()
        assert wanted.tolist() != peer.generate(**inputs, **GREEDY).tolist()

    def test_stop_strings(self) -> None:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
        load: Callable[..., Any] = Idefics2ForConditionalGeneration.from_pretrained
        own = load(DEMO_MODEL, dtype=torch.float32)
        own.generation_backend = "engine"
        inputs = tokenizer(
            ["User: What is on the left?", "User: a"], padding=True, return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
        # The end token of answers is none of these
        plain = GREEDY | {"eos_token_id": tokenizer.eos_token_id}
        free = own.generate(**inputs, **plain)
        text = tokenizer.decode(free[0, inputs["input_ids"].shape[1] :])
        middle = len(text) // 2
        asked = plain | {"stop_strings": [text[middle : middle + 3]], "tokenizer": tokenizer}
        got = own.generate(**inputs, **asked)
        own.generation_backend = "transformers"
        assert got.tolist() == own.generate(**inputs, **asked).tolist()
        assert got.tolist() != free.tolist()

    @pytest.mark.long
    def test_triton(self, peer: Any) -> None:
        own = build_own(peer, MIXED, TRITON)
        own.generation_backend = "engine"
        inputs, asked = batch(MIXED), GREEDY | {"max_new_tokens": 3}
        assert own.generate(**inputs, **asked).tolist() == peer.generate(**inputs, **asked).tolist()

    def test_a_streamer_gets_each_token(self, own: Any) -> None:
        calls: list[list[int] | None] = []

        class Streamer(streamers.BaseStreamer):
            def put(self, value: Tensor) -> None:
                calls.append(value.flatten().tolist())

            def end(self) -> None:
                calls.append(None)

        inputs = {name: tensor[1:2] for name, tensor in batch(MIXED).items()}
        tokens = own.generate(**inputs, **GREEDY, streamer=Streamer())[0].tolist()
        theirs, calls = calls, []
        own.generation_backend = "transformers"
        own.generate(**inputs, **GREEDY, streamer=Streamer())
        assert theirs == calls
        assert tokens[-12:] == [token for (token,) in theirs[1:-1]]  # type: ignore[misc]

    def test_equal_pictures_are_encoded_once(self) -> None:
        peer = build_peer(EVEN)
        own = build_own(peer, EVEN)
        own.generation_backend = "engine"
        inputs = {name: tensor[[0, 1, 0]] for name, tensor in batch(EVEN).items()}
        assert (
            own.generate(**inputs, **GREEDY).tolist() == peer.generate(**inputs, **GREEDY).tolist()
        )
        assert engine_of(own).stats.encoded_tiles == 2
        # They are another picture with another size or other values
        inputs["pixel_values"][2, 0, 0, 0, 0] += 1.0
        own.generate(**inputs, **GREEDY)
        assert engine_of(own).stats.encoded_tiles == 2 + 3


class TestSampling:
    def test_answers_to_one_prompt(self, own: Any) -> None:
        inputs = batch(MIXED)
        asked = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
        torch.manual_seed(3)
        first = own.generate(**inputs, **asked)
        torch.manual_seed(3)
        again = own.generate(**inputs, **asked)
        other = own.generate(**inputs, **asked)
        width = inputs["input_ids"].shape[1]
        assert first[:, :width].tolist() == inputs["input_ids"].repeat_interleave(3, 0).tolist()
        assert first.shape == (9, width + 8)
        assert first.tolist() == again.tolist() != other.tolist()
        assert len({tuple(row) for row in first.tolist()}) == 9
        # A prompt and its pictures are computed once
        assert engine_of(own).stats.encoded_tiles == 3 * 4

    def test_narrow_choices_are_greedy(self, peer: Any, own: Any) -> None:
        wanted = peer.generate(**batch(MIXED), **GREEDY).tolist()
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}):
            asked = {"max_new_tokens": 12, "do_sample": True, **narrow}
            assert own.generate(**batch(MIXED), **asked).tolist() == wanted


class TestEngine:
    def test_it_grows_with_the_call_and_closes(self, peer: Any, own: Any) -> None:
        assert engine_of(own) is None
        own.generate(**batch(MIXED), **GREEDY)
        first = engine_of(own)
        assert first.config.kv_cache_tokens == 3 * 2 * 64
        own.generate(**batch(MIXED), **GREEDY)
        assert engine_of(own) is first
        longer = {**GREEDY, "max_new_tokens": 50}
        wanted = peer.generate(**batch(MIXED), **longer)
        assert own.generate(**batch(MIXED), **longer).tolist() == wanted.tolist()
        assert engine_of(own).config.kv_cache_tokens == 8 * 64
        own.engine.close()
        assert engine_of(own) is None
        assert own.generate(**batch(MIXED), **longer).tolist() == wanted.tolist()

    def test_all_rows_run_at_once(self, own: Any) -> None:
        ids = torch.randint(5, 90, (40, 30), generator=torch.Generator().manual_seed(0))
        own.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        stats = engine_of(own).stats
        assert stats.text_steps + stats.decode_steps == GREEDY["max_new_tokens"]

    def test_steps_are_bounded_by_rows_and_not_by_the_model(self, own: Any) -> None:
        own.generate(**batch(MIXED), **GREEDY)
        config = engine_of(own).config
        assert (config.max_num_seqs, config.max_cached_images) == (3, 4)
