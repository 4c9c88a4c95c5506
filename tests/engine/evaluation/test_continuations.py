"""The likelihood of a text after a prompt."""

from dataclasses import replace
from math import inf

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.evaluation.continuations import Continuation, Likelihood
from idefics2_engine.evaluation.one_pass import answer_all
from idefics2_engine.runtime.config import PAGE_SIZE
from oracle import random_image

SETTINGS = {"max_model_len": 512}


def scored(llm: LLM, *continuations: Continuation) -> list[Likelihood]:
    makers = [one.question for one in continuations]
    outputs = answer_all(llm, makers, str)
    pairs = zip(continuations, outputs, strict=True)
    return [one.likelihood(output) for one, output in pairs if output is not None]


def by_whole_prompt(llm: LLM, one: Continuation) -> float:
    prompt = {"prompt_token_ids": one.token_ids, "multi_modal_data": {"image": [*one.images]}}
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    places = [*zip(one.token_ids, output.prompt_logprobs, strict=True)][one.start :]
    return sum(place[token].logprob for token, place in places if place)


def test_answers_to_one_question_compute_it_once(llm: LLM) -> None:
    text = "What is on the left of the red car, and what is behind it? " * 9
    content = [{"type": "image", "image": random_image(90, 70)}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    end = llm.processor.tokenizer.end_of_utterance_id
    assert end is not None
    answers = ["A house.", " A tree.", "Nothing", ""]
    made = [Continuation.of_chat(llm.processor, messages, answer, [end]) for answer in answers]
    question = llm.processor.chat(messages)
    for one, answer in zip(made, answers, strict=True):
        assert one.token_ids[: one.start] == question.token_ids
        assert llm.processor.tokenizer.decode(one.token_ids[one.start : -1]) == answer.strip()
        assert one.token_ids[-1] == end
    before = replace(llm.stats)
    found = scored(llm, *made)
    pages = (len(question.token_ids) - 1) // PAGE_SIZE
    assert pages >= 2
    assert llm.stats.cached_tokens - before.cached_tokens == 3 * pages * PAGE_SIZE
    assert llm.stats.encoded_tiles - before.encoded_tiles == len(question.tiles)
    for one, likelihood in zip(made, found, strict=True):
        assert likelihood.num_tokens == len(one.token_ids) - one.start
        assert likelihood.logprob == pytest.approx(by_whole_prompt(llm, one), abs=1e-4)


def test_the_greedy_answer_is_known(llm: LLM) -> None:
    prompt = llm.processor.tokenizer.encode("the chicken sits on")
    (answer,) = llm.generate(
        {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=4, min_tokens=4)
    )
    likeliest = answer.outputs[0].token_ids
    other = [*likeliest[:3], likeliest[3] + 1]
    start = len(prompt)
    best, second = scored(
        llm, Continuation([*prompt, *likeliest], start), Continuation([*prompt, *other], start)
    )
    assert best.is_greedy
    assert not second.is_greedy
    assert best.logprob > second.logprob


def test_nothing_is_certain_and_an_error_impossible(llm: LLM) -> None:
    prompt = llm.processor.tokenizer.encode("the chicken sits on")
    empty = Continuation(prompt, len(prompt))
    too_long = Continuation([5] * 700, 699)
    assert scored(llm, empty, too_long) == [Likelihood(0, 0, True), Likelihood(-inf, 1, False)]
