"""Log probabilities, penalties and barred words through ``LLM``, on a tiny model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import ConfigError, SamplingError
from idefics2_engine.model.batch import ImageBatch, TextBatch
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_engine.sampling.bad_words import bad_words_ids
from idefics2_engine.sampling.logprobs import TokenTexts
from oracle import random_image

EOS, END_OF_UTTERANCE, FAKE, IMAGE = 2, 32002, 32000, 32001
VOCAB = 32003


def make_prompts() -> list[dict[str, Any]]:
    images = [random_image(70, 60 + 9 * i, seed=i) for i in range(3)]
    return [
        {"prompt": "What is left of the red car?"},
        {"prompt": "<image>A chicken", "multi_modal_data": {"image": images[0]}},
        {"prompt": "<image>on <image>money", "multi_modal_data": {"image": images[1:]}},
        {"prompt_token_ids": [1]},
    ]


def model_logprobs(llm: LLM, prompt: dict[str, Any], token_ids: list[int]) -> Tensor:
    """Run the model over ``token_ids`` at once, without a cache: (T, V)."""
    images = prompt.get("multi_modal_data", {}).get("image", [])
    images = images if isinstance(images, list) else [images]
    text = prompt.get("prompt")
    draft = (
        llm.processor.draft_token_prompt(prompt["prompt_token_ids"], images)
        if text is None
        else llm.processor.draft_prompt(text, images)
    )
    (processed,) = llm.processor.finish([draft])
    with torch.inference_mode():
        features = None
        if processed.tiles:
            features = llm.model.image_features(
                ImageBatch.from_tiles(processed.tiles, llm.processor.image_config)
            )
        logits: Tensor = llm.model(TextBatch.from_ids([token_ids]), features)
        return logits.log_softmax(-1)


def test_logprobs_are_the_models_log_softmax(llm: LLM) -> None:
    prompts = make_prompts()
    params = [
        SamplingParams(temperature=0.0, max_tokens=6, logprobs=5, prompt_logprobs=3),
        SamplingParams(seed=1, max_tokens=5, logprobs=0, prompt_logprobs=0, n=2),
        SamplingParams(seed=2, max_tokens=4, logprobs=2, prompt_logprobs=20, repetition_penalty=2),
        SamplingParams(temperature=0.0, max_tokens=3, logprobs=1, prompt_logprobs=1),
    ]
    outputs = llm.generate(prompts, params)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        length = len(output.prompt_token_ids)
        for answer in output.outputs:
            tokens = [*output.prompt_token_ids, *answer.token_ids]
            exact = model_logprobs(llm, prompt, tokens)
            assert output.prompt_logprobs is not None
            assert answer.logprobs is not None
            assert output.prompt_logprobs[0] is None
            places = [*output.prompt_logprobs[1:], *answer.logprobs]
            assert len(output.prompt_logprobs) == length
            assert len(answer.logprobs) == len(answer.token_ids)
            for i, (token, place) in enumerate(zip(tokens[1:], places, strict=True)):
                number = param.prompt_logprobs if i + 1 < length else param.logprobs
                assert place is not None
                assert next(iter(place)) == token
                assert number is not None
                assert number <= len(place) <= number + 1
                best = exact[i].topk(number).values
                ranked = sorted(entry.logprob for entry in place.values() if entry.rank <= number)
                assert torch.tensor(ranked[::-1]).allclose(best, atol=1e-5)
                for id, entry in place.items():
                    assert entry.logprob == pytest.approx(exact[i, id].item(), abs=1e-5)
                    assert entry.rank >= 1 + int((exact[i] > exact[i, id] + 1e-5).sum())
                    assert entry.rank <= 1 + int((exact[i] > exact[i, id] - 1e-5).sum())
            chosen = [
                place[t].logprob for t, place in zip(answer.token_ids, answer.logprobs, strict=True)
            ]
            assert answer.cumulative_logprob == pytest.approx(sum(chosen))
            if param.temperature == 0:
                assert all(
                    p[t].rank == 1 for t, p in zip(answer.token_ids, answer.logprobs, strict=True)
                )


def test_logprobs_are_none_unless_requested(llm: LLM) -> None:
    (output,) = llm.generate("a b", SamplingParams(max_tokens=2))
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_probabilities_of_the_whole_vocabulary_sum_to_one(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, logprobs=-1, prompt_logprobs=-1, seed=0)
    (output,) = llm.generate({"prompt_token_ids": [1, 300]}, params)
    places = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    assert len(places) == 2
    for place in places:
        assert place is not None
        assert place.keys() == set(range(VOCAB))
        assert sorted(entry.rank for entry in place.values()) == [*range(1, VOCAB + 1)]
        total = torch.tensor([e.logprob for e in place.values()], dtype=torch.float64).exp().sum()
        assert total.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("params", "length", "message"),
    [
        ({"logprobs": -1, "max_tokens": 16}, 5, None),
        ({"logprobs": -1, "max_tokens": 17}, 5, "logprobs must be at most 30839 for 17 tokens, got -1"),
        ({"logprobs": VOCAB, "max_tokens": 17}, 5, "logprobs must be at most 30839 .* got 32003"),
        ({"logprobs": -1, "max_tokens": None}, 12, "logprobs must be at most 1047 for 500 tokens"),
        ({"logprobs": 1047, "max_tokens": None}, 12, None),
        ({"logprobs": 1048, "max_tokens": None}, 12, "at most 1047 .* 524288 entries"),
        ({"logprobs": -1, "n": 16, "max_tokens": 2}, 5, "at most 16383 for 32 tokens"),
        ({"logprobs": 21, "n": 3000, "max_tokens": 16}, 5, "at most 20 for 48000 tokens, got 21"),
        ({"logprobs": 20, "n": 3000, "max_tokens": 16}, 5, None),
        ({"prompt_logprobs": -1}, 17, None),
        ({"prompt_logprobs": -1}, 18, "prompt_logprobs must be at most 30839 for 17 tokens"),
        ({"prompt_logprobs": -1, "prompt_logprobs_start": 1}, 18, "at most 30839 for 17 tokens"),
        ({"prompt_logprobs": -1, "prompt_logprobs_start": 2}, 18, None),
        ({"prompt_logprobs": 0, "prompt_logprobs_start": 17}, 18, None),
        ({"prompt_logprobs": 0, "prompt_logprobs_start": 18}, 18, "below the prompt's 18 .* got 18"),
        ({"prompt_logprobs": 20, "logprobs": 20, "max_tokens": 12}, 500, None),
    ],
)  # fmt: skip
def test_number_of_logprobs_of_a_request_is_bounded(
    llm: LLM, params: dict[str, Any], length: int, message: str | None
) -> None:
    """As Python objects a whole vocabulary takes megabytes at every position."""
    draft = llm.processor.draft_token_prompt([5] * length)
    (prompt,) = llm.processor.finish([draft])
    asked = SamplingParams(**params)
    if message is None:
        assert llm.request_builder.build(prompt, asked).params == asked
        return
    with pytest.raises(SamplingError, match=message):
        llm.request_builder.build(prompt, asked)


def test_prompts_scored_from_a_later_position_share_their_beginning(llm: LLM) -> None:
    beginning = [*range(300, 300 + 3 * PAGE_SIZE + 5)]
    prompts = [{"prompt_token_ids": [*beginning, end, 7]} for end in (11, 12, 13)]
    start = len(beginning)
    whole = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    ends = replace(whole, prompt_logprobs_start=start)
    for known, scored in zip(
        llm.generate(prompts, whole), llm.generate(prompts, ends), strict=True
    ):
        assert known.num_cached_tokens == 0
        assert scored.num_cached_tokens == 3 * PAGE_SIZE
        assert scored.outputs[0].token_ids == known.outputs[0].token_ids
        assert known.prompt_logprobs is not None
        assert scored.prompt_logprobs is not None
        assert scored.prompt_logprobs[:start] == [None] * start
        assert len(scored.prompt_logprobs) == len(known.prompt_logprobs)
        for one, two in zip(
            scored.prompt_logprobs[start:], known.prompt_logprobs[start:], strict=True
        ):
            assert one is not None
            assert two is not None
            assert one.keys() == two.keys()
            for token in one:
                assert one[token].logprob == pytest.approx(two[token].logprob, abs=1e-5)
                assert one[token].rank == two[token].rank


def test_the_first_scored_position_is_never_cached(llm: LLM) -> None:
    """The token before it is computed also where it ends a page."""
    tokens = [*range(400, 400 + 2 * PAGE_SIZE + 2)]
    for start in (2 * PAGE_SIZE - 1, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 1):
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
        (output,) = llm.generate({"prompt_token_ids": tokens}, params)
        places = output.prompt_logprobs or []
        assert [place is None for place in places] == [
            place < start for place in range(len(tokens))
        ]


def test_logprobs_do_not_depend_on_the_batch_or_change_the_answer(llm: LLM) -> None:
    prompts = make_prompts()
    params = SamplingParams(seed=4, max_tokens=3, logprobs=2, prompt_logprobs=2)
    together = llm.generate(prompts, params)
    plain = llm.generate(prompts, SamplingParams(seed=4, max_tokens=3))
    for prompt, output, other in zip(prompts, together, plain, strict=True):
        (alone,) = llm.generate(prompt, params)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert other.outputs[0].token_ids == output.outputs[0].token_ids
        for one, two in zip(
            [*(alone.prompt_logprobs or [])[1:], *(alone.outputs[0].logprobs or [])],
            [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])],
            strict=True,
        ):
            assert one is not None
            assert two is not None
            # The last bits of the model's own sums depend on the batch
            assert next(iter(one.values())).logprob == pytest.approx(
                next(iter(two.values())).logprob, abs=1e-5
            )


def test_stop_string_cuts_the_text_but_not_tokens_and_logprobs(llm: LLM) -> None:
    prompt = make_prompts()[0]
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    whole = llm.generate(prompt, greedy)[0].outputs[0]
    stop = whole.text[9:14]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=stop, logprobs=1)
    streamed = list(llm.stream(prompt, params))
    cut = streamed[-1].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.logprobs is not None
    assert len(cut.logprobs) == len(cut.token_ids)
    for number, output in enumerate(streamed, start=1):
        answer = output.outputs[0]
        assert len(answer.token_ids) == number
        assert answer.logprobs == cut.logprobs[:number]


def test_decoded_tokens_join_to_the_text(llm: LLM) -> None:
    tokenizer = llm.processor.tokenizer
    text = TokenTexts(tokenizer)
    for sentence in ("What is  left,\nof the red car?", "Überzug; naïve — 100%"):
        ids = tokenizer.encode_plain(sentence)
        assert "".join(map(text, ids)) == " " + sentence
    assert text(IMAGE) == "<image>"
    assert text(tokenizer.encode_plain("🦩")[1]) == "\ufffd"


# Tests of penalties, barred words and biases


def test_repeated_tokens_are_penalized(llm: LLM) -> None:
    prompt = make_prompts()[1]

    # The biased tokens are far above all others
    bias = dict.fromkeys(range(500, 504), 30.0)

    def counts(**params: Any) -> list[int]:
        params |= {"temperature": 0.0, "max_tokens": 12, "logit_bias": bias}
        (output,) = llm.generate(prompt, SamplingParams(**params))
        return sorted(output.outputs[0].token_ids.count(i) for i in bias)

    assert sum(counts()) == 12
    assert counts()[0] == 0, "the likeliest goes round"
    assert counts(frequency_penalty=2.0)[0] >= 2, "nearly each in turn"
    assert counts(presence_penalty=2.0)[0] > 0


def test_image_tokens_are_never_generated(llm: LLM) -> None:
    prompts = make_prompts()
    bias = {IMAGE: 100.0, FAKE: 100.0}
    for params in (
        SamplingParams(seed=0, max_tokens=6, logit_bias=bias, frequency_penalty=-2.0),
        SamplingParams(temperature=0.0, max_tokens=6, logit_bias=bias, presence_penalty=-2.0),
        SamplingParams(seed=0, max_tokens=6, allowed_token_ids=[IMAGE, FAKE, 700]),
        SamplingParams(seed=0, max_tokens=6, repetition_penalty=1e-6, logit_bias=bias),
    ):
        for output in llm.generate(prompts, params):
            assert not {IMAGE, FAKE} & {*output.outputs[0].token_ids}
    (only,) = llm.generate("a", SamplingParams(max_tokens=3, allowed_token_ids=[IMAGE, 700]))
    assert only.outputs[0].token_ids == [700] * 3


def test_image_slots_do_not_count_as_repetition(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    """If the image token may be produced, the penalty does not change its logit."""
    sampler = LLM(checkpoint, device="cpu").engine.sampler
    sampler.bad_words_ids = []
    draft = llm.processor.draft_prompt("<image>a", [random_image(60, 60)])
    request = llm.request_builder.build(
        llm.processor.finish([draft])[0],
        SamplingParams(temperature=0.0, repetition_penalty=1.5, logprobs=0),
    )
    llm.engine.add(request)
    llm.engine.cancel(request)
    assert IMAGE in request.prompt_token_ids
    logits = torch.zeros(1, VOCAB)
    logits[0, IMAGE] = 3.0
    # The penalty divides it by 1.5
    logits[0, request.prompt_token_ids[-1]] = 4.0
    assert sampler.sample(logits, request.sequences)[0].token_id == IMAGE


def test_bad_words_have_forms_with_and_without_a_space(llm: LLM) -> None:
    tokenizer = llm.processor.tokenizer
    spaced, inside = tokenizer.encode_plain("red")[0], tokenizer.encode_plain("\nred")[-1]
    assert spaced != inside
    assert bad_words_ids(["red", "  red"], tokenizer) == ((spaced,), (inside,))
    for word in ("the red", "🦩", "é", "ing", "<end_of_utterance>", "\n", "a  b"):
        for ids in bad_words_ids([word], tokenizer):
            assert tokenizer.decode(ids, skip_special_tokens=False).lstrip() == word.lstrip()
            assert 1 not in ids, "no <s>"
    assert (END_OF_UTTERANCE,) in bad_words_ids(["<end_of_utterance>"], tokenizer)


def test_bad_words_are_not_generated(llm: LLM) -> None:
    prompt = make_prompts()[0]
    greedy = SamplingParams(temperature=0.0, max_tokens=30)
    plain = llm.generate(prompt, greedy)[0].outputs[0]
    pieces = [TokenTexts(llm.processor.tokenizer)(i) for i in plain.token_ids]
    words = [piece.strip() for piece in pieces if piece.strip().isalpha()][:8]
    pair = "".join(pieces[2:4]).strip()
    params = SamplingParams(temperature=0.0, max_tokens=30, bad_words=[*words, pair])
    assert len(words) == 8
    without = llm.generate(prompt, params)[0].outputs[0]
    for ids in bad_words_ids([*words, pair], llm.processor.tokenizer):
        answer = without.token_ids
        assert not any(answer[i : i + len(ids)] == [*ids] for i in range(len(answer)))


def test_bad_word_that_begins_in_the_prompt_may_end_in_the_answer(llm: LLM) -> None:
    tokenizer = llm.processor.tokenizer
    the, red = tokenizer.encode_plain("the red")
    for prompt, wanted in (([1, the], [red, the]), ([1], [the, the])):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=2,
            allowed_token_ids=[the, red],
            bad_words=["the red"],
            logit_bias={red: 100.0} if prompt[1:] else {the: 100.0},
        )
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        got = output.outputs[0].token_ids
        assert got[0] == wanted[0]
        assert [the, red] != got


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids must be below .* 32003, got 32003"),
        ({"logit_bias": {40000: 1.0}}, "logit_bias must be below .* 32003, got 40000"),
        ({"logprobs": VOCAB + 1}, "logprobs must be at most the vocabulary's 32003, got 32004"),
        ({"prompt_logprobs": 10**9}, "prompt_logprobs must be at most .* got 1000000000"),
        ({"allowed_token_ids": [IMAGE, FAKE]}, "allowed_token_ids must leave a token"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids must leave a token"),
        (
            {"allowed_token_ids": [9], "stop_token_ids": [9], "min_tokens": 1, "ignore_eos": True},
            "allowed_token_ids must leave a token",
        ),
        ({"allowed_token_ids": [700], "bad_words": ["\n", "x"]}, None),
        ({"allowed_token_ids": [EOS], "min_tokens": 1, "ignore_eos": True}, None),
        ({"allowed_token_ids": [EOS]}, None),
    ],
)
def test_params_beyond_the_model_are_refused(
    llm: LLM, params: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert llm.generate("a", SamplingParams(max_tokens=2, **params))[0].finished
        return
    with pytest.raises(SamplingError, match=message):
        llm.generate("a", SamplingParams(**params))
    assert not llm.engine.has_work


def test_bad_words_may_not_bar_the_only_allowed_token(llm: LLM) -> None:
    (token,) = llm.processor.tokenizer.encode_plain("red")
    params = SamplingParams(allowed_token_ids=[token], bad_words=["red"])
    with pytest.raises(SamplingError, match="allowed_token_ids must leave a token"):
        llm.generate("a", params)


def test_order_of_filters_is_an_engine_option(checkpoint: Path, llm: LLM) -> None:
    theirs = LLM(checkpoint, device="cpu", sampling_order="hf")
    assert llm.engine.sampler.min_p_first
    assert not theirs.engine.sampler.min_p_first
    for order in ("HF", "", None, "vllm "):
        with pytest.raises(ConfigError, match="sampling_order must be 'vllm' or 'hf', got"):
            LLM(checkpoint, device="cpu", sampling_order=order)  # type: ignore[arg-type]
