"""The generate loop: transformers' greedy tokens, sampling, stop rules and batching."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import ConfigError, PromptError, SamplingError
from oracle import random_image
from tiny_checkpoint import IMAGE, LATENTS, write_checkpoint

EOS, END_OF_UTTERANCE, FAKE = 2, 32002, 32000


@pytest.fixture(scope="module")
def checkpoint_and_oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a checkpoint whose window is shorter than its prompts, and transformers' model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, window=24)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_and_oracle: tuple[Path, Any]) -> Path:
    return checkpoint_and_oracle[0]


@pytest.fixture(scope="module")
def oracle(checkpoint_and_oracle: tuple[Path, Any]) -> Any:
    return checkpoint_and_oracle[1]


WORDS = [
    "the",
    "chicken",
    "sits",
    "on",
    "a",
    "pile",
    "of",
    "money",
    "and",
    "looks",
    "at",
    "what",
    "is",
    "left",
    "of",
    "the",
    "red",
    "car",
]


def make_prompts() -> list[dict[str, Any]]:
    """Return twenty prompts of unequal length with no image, one and several."""
    prompts = []
    for i in range(20):
        images = [random_image(60 + 7 * i, 140 - 5 * i, seed=10 * i + j) for j in range(i % 3)]
        text = " ".join(WORDS[j * 3 % len(WORDS)] for j in range(i, 2 * i + 3))
        prompts.append(
            {"prompt": "<image>" * len(images) + text, "multi_modal_data": {"image": images}}
        )
    return prompts


def oracle_generate(llm: LLM, oracle: Any, prompts: list[dict[str, Any]], **options: Any) -> Any:
    """Run transformers on a left-padded batch; return the new tokens of each row."""
    inputs = llm.processor.padded(
        [p["prompt"] for p in prompts],
        [p["multi_modal_data"]["image"] for p in prompts],
        padding_side="left",
    )
    tensors = {name: torch.as_tensor(array) for name, array in inputs.items()}
    with torch.no_grad():
        out = oracle.generate(
            **tensors,
            do_sample=False,
            eos_token_id=[EOS, END_OF_UTTERANCE],
            bad_words_ids=[[FAKE], [IMAGE]],
            pad_token_id=0,
            **options,
        )
    return out[:, tensors["input_ids"].shape[1] :].tolist()


def greedy_tokens(llm: LLM, prompts: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, **options))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("their_options", "our_options"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"min_new_tokens": 10}, {"min_tokens": 10}),
    ],
    ids=["plain", "repetition-penalty", "min-tokens"],
)
def test_greedy_tokens_equal_transformers(
    llm: LLM,
    oracle: Any,
    their_options: dict[str, Any],
    our_options: dict[str, Any],
) -> None:
    prompts = make_prompts()
    expected = oracle_generate(llm, oracle, prompts, max_new_tokens=24, **their_options)
    got = greedy_tokens(llm, prompts, max_tokens=24, **our_options)
    for want, have in zip(expected, got, strict=True):
        ends = [i for i, token in enumerate(want) if token in (EOS, END_OF_UTTERANCE)]
        assert have == want[: ends[0] + 1 if ends else len(want)]
    assert len({tuple(tokens) for tokens in got}) > 10, "the prompts must matter"


def test_barred_tokens_are_not_chosen_if_most_likely(checkpoint: Path, llm: LLM) -> None:
    prompt = make_prompts()[7]
    token = greedy_tokens(llm, [prompt], max_tokens=1)[0][0]
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    barred = LLM(checkpoint, device="cpu", max_num_seqs=1)
    barred.engine.sampler.bad_words_ids = [*generation["bad_words_ids"], [token]]
    second = greedy_tokens(barred, [prompt], max_tokens=1)[0][0]
    assert second != token
    barred.engine.sampler.bad_words_ids.append([token, second])
    assert second in greedy_tokens(barred, [prompt], max_tokens=2)[0]


def test_batch_equals_single(checkpoint: Path, llm: LLM) -> None:
    prompts = make_prompts()
    narrow = LLM(checkpoint, device="cpu", max_num_seqs=3, max_model_len=80, kv_cache_tokens=192)
    assert greedy_tokens(narrow, prompts, max_tokens=8) == greedy_tokens(llm, prompts, max_tokens=8)
    assert [greedy_tokens(llm, [prompt], max_tokens=8)[0] for prompt in prompts] == greedy_tokens(
        llm, prompts, max_tokens=8
    )
    narrow.engine.scheduler.pages.check_integrity([])


def test_sampling_depends_only_on_the_seed(llm: LLM) -> None:
    prompts = make_prompts()
    params = [SamplingParams(seed=i, max_tokens=8, top_p=0.95) for i in range(len(prompts))]

    def tokens(some: list[Any], with_params: list[SamplingParams]) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(some, with_params)]

    together = tokens(prompts, params)
    assert together == [tokens([p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    assert together != tokens(prompts, [SamplingParams(seed=99, max_tokens=8)] * len(prompts))


def test_n_answers_differ_and_the_first_equals_a_single_one(llm: LLM) -> None:
    prompt = make_prompts()[4]
    three = llm.generate(prompt, SamplingParams(seed=3, n=3, max_tokens=12))[0]
    one = llm.generate(prompt, SamplingParams(seed=3, max_tokens=12))[0]
    assert [answer.index for answer in three.outputs] == [0, 1, 2]
    assert three.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({tuple(answer.token_ids) for answer in three.outputs}) == 3


def test_filters_keep_the_most_likely_token(llm: LLM) -> None:
    prompts = make_prompts()[:6]
    greedy = greedy_tokens(llm, prompts, max_tokens=6)
    for params in (
        SamplingParams(top_k=1, max_tokens=6),
        SamplingParams(top_p=1e-6, max_tokens=6),
        SamplingParams(min_p=1.0, max_tokens=6),
    ):
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert got == greedy


def test_stop_rules(llm: LLM) -> None:
    prompt = make_prompts()[2]
    plain = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=20))[0].outputs[0]
    assert (plain.finish_reason, len(plain.token_ids)) == ("length", 20)
    assert llm.processor.tokenizer.decode(plain.token_ids) == plain.text

    token = plain.token_ids[5]
    at = plain.token_ids.index(token)
    stopped = llm.generate(
        prompt, SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[token])
    )[0].outputs[0]
    assert stopped.token_ids == plain.token_ids[: at + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert plain.text.startswith(stopped.text)
    assert stopped.text == llm.processor.tokenizer.decode(plain.token_ids[:at])

    stop = plain.text[7:11]
    for include in (False, True):
        cut = llm.generate(
            prompt,
            SamplingParams(
                temperature=0.0, max_tokens=20, stop=stop, include_stop_str_in_output=include
            ),
        )[0].outputs[0]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        end = plain.text.index(stop) + (len(stop) if include else 0)
        assert cut.text == plain.text[:end]

    late = llm.generate(
        prompt, SamplingParams(temperature=0.0, max_tokens=20, min_tokens=20, stop=stop)
    )[0].outputs[0]
    assert len(late.token_ids) == 20


def test_streaming_grows_to_the_same_text(llm: LLM) -> None:
    prompt = make_prompts()[5]
    whole = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=30))[0].outputs[0]
    stop = whole.text[10:16]
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=stop)
    texts, outputs = [""], []
    for output in llm.stream(prompt, params):
        outputs.append(output)
        texts.append(output.outputs[0].text)
        assert texts[-1].startswith(texts[-2]), "text that was shown is never taken back"
    assert texts[-1] == whole.text[: whole.text.index(stop)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    metrics = outputs[-1].metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_closing_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream(make_prompts()[5], SamplingParams(max_tokens=30))
    next(stream)
    stream.close()
    # The engine drops the stream before it begins this request
    llm.generate("x", SamplingParams(max_tokens=1))
    llm.engine.scheduler.pages.check_integrity([])
    assert not llm.engine.has_work


def test_chat_and_raw_prompt_agree(llm: LLM) -> None:
    image = random_image(90, 70)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}],
        }
    ]
    raw = "User:<image>What is it?<end_of_utterance>\nAssistant:"
    params = SamplingParams(temperature=0.0, max_tokens=8)
    chat = llm.chat(messages, params)[0]
    generated = llm.generate({"prompt": raw, "multi_modal_data": {"image": image}}, params)[0]
    assert chat.prompt == generated.prompt == raw
    assert chat.prompt_token_ids == generated.prompt_token_ids
    assert chat.prompt_token_ids.count(IMAGE) == LATENTS
    assert chat.outputs[0].token_ids == generated.outputs[0].token_ids
    ids = llm.generate(
        {"prompt_token_ids": chat.prompt_token_ids, "multi_modal_data": {"image": image}}, params
    )[0]
    assert ids.outputs[0].token_ids == chat.outputs[0].token_ids
    pair = llm.chat([messages, messages], params)
    assert [o.outputs[0].text for o in pair] == [chat.outputs[0].text] * 2


def test_length_is_bounded_by_the_model(checkpoint: Path) -> None:
    short = LLM(checkpoint, device="cpu", max_model_len=12)
    output = short.generate("a b c", SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(PromptError, match="12 tokens, got 14"):
        short.generate("a " * 12)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ({"text": "x"}, "must have 'prompt'"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "must have 'prompt'"),
        ({"prompt": "x", "images": []}, "must have 'prompt'"),
        ({"prompt": "x", "multi_modal_data": {"video": 1}}, "multi_modal_data"),
        ({"prompt_token_ids": []}, "at least one token"),
        ({"prompt_token_ids": [1, 99999]}, "99999"),
        (17, "text or a mapping"),
    ],
)
def test_malformed_prompts_are_refused(llm: LLM, prompt: Any, match: str) -> None:
    with pytest.raises(PromptError, match=match):
        llm.generate([prompt])
    assert not llm.engine.has_work


def test_malformed_arguments_are_refused(checkpoint: Path, llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder"):
        LLM(tmp_path / "absent")
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(checkpoint, max_model_len=513)
    with pytest.raises(ConfigError, match="dtype"):
        LLM(checkpoint, dtype="int4")
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        LLM(checkpoint, kv_cache_tokens=100)
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="gpu_memory_utilization must be a number in"):
            LLM(checkpoint, gpu_memory_utilization=share)
    with pytest.raises(PromptError, match="sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_calls_beside_an_open_stream_do_not_affect_each_other(llm: LLM) -> None:
    prompt = make_prompts()[3]
    params = SamplingParams(temperature=0.0, max_tokens=6)
    whole = llm.generate(prompt, params)[0].outputs[0].text
    stream = llm.stream(prompt, params)
    next(stream)
    assert llm.generate(prompt, params)[0].outputs[0].text == whole
    assert list(stream)[-1].outputs[0].text == whole
    assert llm.generate(prompt, params)[0].outputs[0].text == whole


def test_image_tokens_are_barred_with_a_bare_generation_config(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true}')
    llm = LLM(tmp_path, device="cpu")
    with torch.no_grad():
        llm.model.lm_head.zero_()
    prompt = {"prompt": "a", "multi_modal_data": {}}
    tokens = llm.generate(prompt, SamplingParams(seed=0, max_tokens=400))[0].outputs[0].token_ids
    assert not {FAKE, IMAGE} & set(tokens)
    assert llm.engine.sampler.bad_words_ids == [[FAKE], [IMAGE]]
    assert llm.engine.generation.eos_token_ids == {EOS, END_OF_UTTERANCE}


def test_stop_ids_outside_the_vocabulary_are_refused(llm: LLM) -> None:
    with pytest.raises(SamplingError, match="below the vocabulary's 32003, got 40000"):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(stop_token_ids=[40000])])
    assert not llm.engine.has_work


def test_every_stop_id_of_the_vocabulary_is_accepted(llm: LLM) -> None:
    params = SamplingParams(stop_token_ids=[0, 32002], max_tokens=2, seed=0)
    assert llm.generate("a", params)[0].finished
    with pytest.raises(SamplingError, match="below the vocabulary's 32003, got 32003"):
        llm.generate("a", SamplingParams(stop_token_ids=[0, 32003]))


def test_min_tokens_beyond_the_room_are_refused(checkpoint: Path) -> None:
    short = LLM(checkpoint, device="cpu", max_model_len=12)
    prompt = {"prompt_token_ids": [1] * 8}
    four = SamplingParams(max_tokens=None, min_tokens=4)
    assert len(short.generate(prompt, four)[0].outputs[0].token_ids) == 4
    for max_tokens in (None, 16):
        with pytest.raises(
            SamplingError, match=r"min_tokens must be at most the 4 .* of 12, got 5"
        ):
            short.generate(prompt, SamplingParams(max_tokens=max_tokens, min_tokens=5))
    assert not short.engine.has_work


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, "", "greedy", 7, [{}, {}], [SamplingParams(), 7]]
)
def test_other_sampling_params_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(SamplingError, match="sampling_params must be SamplingParams, got "):
        llm.generate(["a", "b"] if isinstance(params, list) else "a", params)
    if not isinstance(params, list):
        with pytest.raises(SamplingError, match="sampling_params must be SamplingParams, got "):
            next(llm.stream("a", params))
    assert not llm.engine.has_work


def test_smallest_temperature_and_top_p_are_greedy(llm: LLM) -> None:
    """In fp32 both values are 0, and logits cannot be divided by 0."""
    prompts = make_prompts()[:4]
    greedy = greedy_tokens(llm, prompts, max_tokens=4)
    for params in (
        SamplingParams(temperature=5e-324, max_tokens=4),
        SamplingParams(top_p=5e-324, max_tokens=4),
        SamplingParams(temperature=1e-30, top_p=1e-30, min_p=1, top_k=1, max_tokens=4),
    ):
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert got == greedy


def test_repetition_penalty_with_only_image_tokens(llm: LLM) -> None:
    prompt = {
        "prompt_token_ids": [IMAGE] * LATENTS,
        "multi_modal_data": {"image": random_image(60, 60)},
    }
    params = SamplingParams(temperature=0.0, repetition_penalty=1.1, max_tokens=2)
    assert len(llm.generate(prompt, params)[0].outputs[0].token_ids) == 2


def test_default_cache_holds_every_full_sequence(checkpoint: Path) -> None:
    config = LLM(checkpoint, device="cpu", max_model_len=65, max_num_seqs=8).engine_config
    assert config.num_pages == 8 * 2


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_numpy_numbers_are_accepted(llm: LLM) -> None:
    params = SamplingParams(temperature=np.float32(0.5), seed=np.int64(3), max_tokens=np.int64(2))  # type: ignore[arg-type]
    plain = SamplingParams(temperature=0.5, seed=3, max_tokens=2)
    ids = np.array([1, 330, 13088])
    one, other = (llm.generate({"prompt_token_ids": ids}, p)[0] for p in (params, plain))
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert one.prompt_token_ids == ids.tolist()


@pytest.mark.parametrize("messages", ["hello", {"role": "user", "content": "x"}])
def test_other_conversations_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(PromptError, match="messages must be a list"):
        llm.chat(messages)


def test_invalid_devices_are_refused(checkpoint: Path) -> None:
    for device in ("meta", "mps", "tpu", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(ConfigError, match="device"):
            LLM(checkpoint, device=device)
