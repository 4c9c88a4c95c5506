"""Constrained answers of the engine: the same however the work is divided, and no other changed."""

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import BaseModel, field_validator

from graph_stand_in import PADDED_REFERENCE, StandInPool
from idefics2_engine import LLM, SamplingParams, StructuredOutputsParams
from idefics2_engine.errors import RequestFailedError, SamplingError, StructuredOutputError
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.sampling.token_masks import TokenMasks
from idefics2_engine.scheduling.sequence import Request
from idefics2_kernels import ROW_BY_ROW
from structured_cases import closed

SCHEMA = closed(
    {
        "description": {"enum": ["a red circle", "a star", "nothing"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 30},
        "is_visible": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 6},
    },
    "description", "number", "is_visible",
)  # fmt: skip
CONSTRAINTS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"choice": ["a circle", "a star", "a circle and a star"]},
    {"regex": "[A-Z][a-z]{2,9}( and [a-z]{3,8}){0,2}\\."},
    {"json_object": True},
    {"grammar": 'start: "[" item ("," item)* "]"\nitem: /[a-c]{1,4}/'},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Load a model with random weights, which wants anything, on the demo's tokenizer."""
    return LLM(
        load_format="dummy", device="cpu", dtype="float32", max_model_len=256, ops=ROW_BY_ROW
    )


def make_engine(llm: LLM, **sizes: Any) -> Engine:
    config = EngineConfig(
        **{
            "max_model_len": 256,
            "max_num_seqs": 64,
            "kv_cache_tokens": 8192,
            "max_cached_images": 8,
            "max_num_batched_tokens": 512,
            "max_patches": 4900,
            "page_size": 16,
            "run_ahead": True,
            "cuda_graphs": False,
            **sizes,
        }
    )
    old = llm.engine
    image_config = llm.processor.image_config
    return Engine(llm.model, old.tokenizer, image_config, old.generation, config)


def make_request(llm: LLM, text: str, **params: Any) -> Request:
    (prompt,) = llm.processor.finish([llm.request_builder.read_prompt(text)])
    return llm.request_builder.build(prompt, SamplingParams(**params))


def make_requests(llm: LLM, **changes: Any) -> list[Request]:
    """Build ten requests, greedy and sampled, of all kinds and of one or three answers."""
    return [
        make_request(
            llm,
            f"Question {'of a longer kind ' * (i % 3)}{i}:",
            temperature=(0.0, 1.5)[i % 2],
            seed=i,
            n=1 + 2 * (i == 3),
            max_tokens=40,
            structured_outputs=CONSTRAINTS[i % len(CONSTRAINTS)],
            **changes,
        )
        for i in range(10)
    ]


def answers(
    engine: Engine, requests: list[Request], between: Callable[[int], None] = lambda _: None
) -> list[list[list[int]]]:
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.has_work:
        between(steps)
        engine.step()
        engine.scheduler.check_integrity()
        steps += 1
    assert not [request.error for request in requests if request.error]
    return [[output.token_ids for output in request.output().outputs] for request in requests]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[list[int]]]:
    """Answer one request after another, without running ahead."""
    return [
        answers(make_engine(llm, run_ahead=False, max_num_seqs=1), [request])[0]
        for request in make_requests(llm)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"run_ahead": False},
        pytest.param({"max_num_seqs": 3}, marks=pytest.mark.long),
        {"max_num_batched_tokens": 5},
        {"kv_cache_tokens": 256, "max_num_batched_tokens": 32},
        pytest.param({"prefix_caching": False}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_division_of_work(
    llm: LLM, alone: list[list[list[int]]], sizes: dict[str, Any]
) -> None:
    engine = make_engine(llm, **sizes)
    assert answers(engine, make_requests(llm)) == alone
    # The second time, the prefixes are in the cache
    assert answers(engine, make_requests(llm)) == alone
    assert engine.stats.forced_tokens > 100


def test_preemption_changes_no_token(llm: LLM, alone: list[list[list[int]]]) -> None:
    engine = make_engine(llm, max_num_batched_tokens=24)

    def preempt(step: int) -> None:
        if step % 4 == 3 and engine.scheduler.running:
            engine.scheduler.preempt_newest()

    assert answers(engine, make_requests(llm), preempt) == alone
    assert engine.scheduler.num_preemptions > 3


def test_failed_steps_change_no_token(
    llm: LLM, alone: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two draws fail; the masks were computed by then
    engine, calls = make_engine(llm), Counter[str]()
    sample = engine.sampler.draw

    def failing(*arguments: Any) -> Any:
        calls["draw"] += 1
        if calls["draw"] in (3, 9):
            raise torch.OutOfMemoryError
        return sample(*arguments)

    monkeypatch.setattr(engine.sampler, "draw", failing)
    assert answers(engine, make_requests(llm)) == alone
    assert calls["draw"] > 10


def test_graphs_change_no_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics2_engine.runtime.model_runner.GraphPool", StandInPool)
    padded = LLM(load_format="dummy", device="cpu", dtype="float32", ops=PADDED_REFERENCE)
    got = [
        answers(
            make_engine(padded, cuda_graphs=graphs, max_num_batched_tokens=64),
            make_requests(padded),
        )
        for graphs in (False, True)
    ]
    assert got[0] == got[1]


def test_forced_tokens_are_those_that_would_be_drawn(
    llm: LLM, alone: list[list[list[int]]]
) -> None:
    # With log probabilities every token is drawn
    engine = make_engine(llm)
    requests = make_requests(llm, logprobs=0)
    assert answers(engine, requests) == alone
    assert engine.stats.forced_tokens == 0
    forced = make_engine(llm)
    answers(forced, make_requests(llm))
    assert forced.stats.generated_tokens == engine.stats.generated_tokens
    assert forced.stats.forced_tokens > 50


def test_forced_tokens_save_most_passes_of_an_object(llm: LLM) -> None:
    keys = {
        f"property_{i}": ({"type": "boolean"}, {"enum": ["low", "high"]})[i % 2] for i in range(12)
    }
    engine = make_engine(llm)
    request = make_request(
        llm, "Q:", max_tokens=240, structured_outputs={"json": closed(keys, *keys)}
    )
    answers(engine, [request])
    answer = request.output().outputs[0]
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) / engine.stats.steps >= 2.0


def test_other_sequences_have_the_tokens_of_a_run_without(llm: LLM) -> None:
    def run(*, constrained: bool) -> list[list[list[int]]]:
        requests = [
            make_request(
                llm,
                f"Say {i}:",
                temperature=1.0,
                seed=i,
                max_tokens=12,
                structured_outputs=CONSTRAINTS[0] if constrained and i % 3 == 0 else None,
            )
            for i in range(64)
        ]
        return answers(make_engine(llm), requests)

    mixed, free = run(constrained=True), run(constrained=False)
    same = [mine == theirs for mine, theirs in zip(mixed, free, strict=True)]
    assert all(same[i] for i in range(64) if i % 3)
    assert not any(same[i] for i in range(0, 64, 3))


def test_masks_are_computed_for_constrained_sequences_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = TokenMasks.compute

    def spy(self: TokenMasks, sequences: Any) -> Any:
        calls.append(len(sequences))
        return compute(self, sequences)

    monkeypatch.setattr(TokenMasks, "compute", spy)
    answers(make_engine(llm), [make_request(llm, "A:", max_tokens=8) for _ in range(4)])
    assert calls == []
    mixed = [
        make_request(llm, "A:", max_tokens=8, structured_outputs=choice)
        for choice in (None, {"regex": "[a-z]{3,8}"}, None)
    ]
    answers(make_engine(llm), mixed)
    assert {*calls} == {1}


def test_next_pass_is_launched_before_the_last_tokens_are_read(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm)
    events: list[str] = []
    for owner, name in (
        (engine.runner, "run"),
        (engine.masks, "compute"),
        (engine.sampler, "draw"),
    ):
        method = getattr(owner, name)

        def spy(*arguments: Any, name: str = name, method: Any = method) -> Any:
            events.append(name)
            return method(*arguments)

        monkeypatch.setattr(owner, name, spy)
    request = make_request(
        llm, "A:", max_tokens=4, ignore_eos=False, structured_outputs={"regex": "[a-z]{40}"}
    )
    engine.add(request)
    engine.step()
    assert events == ["run", "compute", "draw"]
    assert engine.is_ahead
    append, step = type(request.sequences[0]).append, len(events)

    def landed(*arguments: Any) -> None:
        events.append("land")
        append(*arguments)

    monkeypatch.setattr(type(request.sequences[0]), "append", landed)
    engine.step()
    assert events[step:] == ["run", "land", "compute", "draw"]


# Four draws of every schema share the steps of one engine
@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 20, 4))
def test_every_answer_of_a_random_model_is_valid(llm: LLM, first: int) -> None:
    import jsonschema

    from structured_cases import SCHEMAS

    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    cases = [(schema, seed) for seed in range(first, first + 4) for schema in SCHEMAS]
    requests = [
        make_request(
            llm, "Answer:", temperature=1.5, seed=seed, max_tokens=120,
            structured_outputs={"json": schema},
        )
        for schema, seed in cases
    ]  # fmt: skip
    answers(make_engine(llm, max_num_seqs=256, kv_cache_tokens=65536), requests)
    for (schema, _), request in zip(cases, requests, strict=True):
        output = request.output().outputs[0]
        if output.finish_reason == "stop":
            value = json.loads(output.text)
            assert output.parsed == value
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


class Reading(BaseModel):
    value: int
    unit: str = "m"

    @field_validator("value")
    @classmethod
    def is_small(cls, value: int) -> int:
        if value > 99:
            raise ValueError("too large")
        return value


def ask(llm: LLM, **params: Any) -> Any:
    return llm.generate("Q:", SamplingParams(**{"max_tokens": 60, "seed": 1, **params}))[0]


def test_answer_is_parsed(llm: LLM) -> None:
    constraint = StructuredOutputsParams(json=Reading)
    output = ask(llm, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    assert output.outputs[0].parsed == json.loads(output.outputs[0].text)
    assert json.loads(json.dumps(output.to_dict()))["outputs"][0]["parsed"]
    found = [
        ask(llm, structured_outputs=constraint, seed=seed, max_tokens=80).outputs[0]
        for seed in range(12)
    ]
    models = [one for one in found if isinstance(one.parsed, Reading)]
    assert models
    assert all(one.parsed == Reading.model_validate_json(one.text) for one in models)
    # The schema does not have the validator's rule
    assert all(one.parsed is None for one in found if one not in models)
    assert ask(llm, structured_outputs={"regex": "[0-9]"}).outputs[0].parsed is None


def test_object_of_a_class_is_written_as_data(llm: LLM) -> None:
    output = ask(llm, structured_outputs={"choice": ["x"]})
    answer = replace(output.outputs[0], parsed=Reading(value=3))
    written = replace(output, outputs=[answer]).to_dict()
    assert written["outputs"][0]["parsed"] == {"value": 3, "unit": "m"}


def test_cut_answer_says_length_and_is_not_parsed(llm: LLM) -> None:
    answer = ask(llm, structured_outputs={"json": SCHEMA}, max_tokens=9).outputs[0]
    assert answer.finish_reason == "length"
    assert answer.parsed is None
    assert len(answer.token_ids) == 9


def test_short_max_tokens_are_warned_of(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    constraint = {"json": closed({"distance": {"type": "integer"}}, "distance")}
    with caplog.at_level(logging.WARNING, "idefics2_engine"):
        ask(llm, structured_outputs=constraint, max_tokens=60)
        assert "max_tokens should" not in caplog.text
        for _ in range(3):
            ask(llm, structured_outputs=constraint, max_tokens=5)
    assert caplog.text.count("max_tokens should be at least the") == 1
    assert "got 5" in caplog.text


def test_ends_only_where_the_constraint_is_satisfied(llm: LLM) -> None:
    for seed in range(10):
        answer = ask(llm, structured_outputs={"regex": "a{3,5}"}, seed=seed).outputs[0]
        assert 3 <= len(answer.text) <= 5
        assert answer.finish_reason == "stop"
        # Nothing could follow the longest, so it needs no end token
        ends = answer.token_ids[-1] in llm.engine.generation.eos_token_ids
        assert ends == (len(answer.text) < 5)


def test_min_tokens_hold(llm: LLM) -> None:
    for seed in range(5):
        answer = ask(llm, structured_outputs={"regex": "[a-z]+"}, min_tokens=9, seed=seed).outputs[
            0
        ]
        assert len(answer.token_ids) >= 9


@pytest.mark.parametrize(
    "params",
    [
        {"bad_words": ["at", "t"], "structured_outputs": {"choice": ["cat"]}},
        {"allowed_token_ids": [20, 21], "structured_outputs": {"choice": ["dog"]}},
        {"min_tokens": 9, "structured_outputs": {"choice": ["dog"]}},
    ],
    ids=["bad_words", "allowed_token_ids", "min_tokens"],
)
def test_request_without_a_token_fails_alone(llm: LLM, params: dict[str, Any]) -> None:
    free = SamplingParams(max_tokens=6, seed=3)
    (alone,) = llm.generate(["Other:"], free)
    wrong = SamplingParams(max_tokens=12, **params)
    failed, other = llm.generate(["Q:", "Other:"], [wrong, free])
    assert other.outputs[0].token_ids == alone.outputs[0].token_ids
    assert isinstance(failed.error, StructuredOutputError)
    assert isinstance(failed.error, RequestFailedError)
    assert failed.error.code == "structured"
    assert "structured_outputs must leave a token" in str(failed.error)


def test_logits_that_are_not_finite_are_no_fault_of_the_constraint(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm)
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda step: (run(step)[0].fill_(float("nan")), []))
    request = make_request(llm, "Q:", structured_outputs={"regex": "[a-z]{9}"})
    engine.add(request)
    while engine.has_work:
        engine.step()
    assert request.error is not None
    assert request.error.code == "request_failed"


def test_exceeded_limit_fails_one_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llm)
    compute = engine.masks.compute

    def limited(sequences: Any) -> Any:
        bits, _ = compute(sequences)
        return bits, {s: StructuredOutputError("too much") for s in sequences if s.request is bad}

    monkeypatch.setattr(engine.masks, "compute", limited)
    bad = make_request(llm, "Q:", n=2, structured_outputs={"regex": "[a-z]{9}"})
    good = [make_request(llm, f"{i}:", structured_outputs={"regex": "[a-z]{9}"}) for i in range(2)]
    for request in (good[0], bad, good[1]):
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    assert bad.error is not None
    assert bad.error.code == "structured"
    assert all(len(request.output().outputs[0].text) == 9 for request in good)


def test_log_probabilities_are_the_models(llm: LLM) -> None:
    free = ask(llm, temperature=0.0, max_tokens=1, logprobs=-1).outputs[0]
    bound = ask(
        llm, temperature=0.0, max_tokens=1, logprobs=-1, structured_outputs={"regex": "[0-9]{9}"}
    ).outputs[0]
    assert bound.token_ids != free.token_ids
    (mine,), (theirs,) = bound.logprobs, free.logprobs
    assert {id: one.logprob for id, one in mine.items()} == {
        id: one.logprob for id, one in theirs.items()
    }


def test_stream_grows_by_the_forced_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, seed=1, structured_outputs={"json": SCHEMA})
    outputs = [*llm.stream("Q:", params)]
    texts = [output.outputs[0].text for output in outputs]
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert len(texts) < len(outputs[-1].outputs[0].token_ids)
    assert outputs[-1].outputs[0].parsed == json.loads(texts[-1])


def test_refusal_names_the_row_and_leaves_others(llm: LLM) -> None:
    good = SamplingParams(max_tokens=9, structured_outputs={"choice": ["yes", "no"]})
    bad = SamplingParams(max_tokens=9, structured_outputs={"regex": "(?=a)b"})
    for order in ([good, bad], [bad, good]):
        outputs = {
            int(output.request_id): output for output in llm.iterate([("Q:", p) for p in order])
        }
        for index, params in enumerate(order):
            if params is bad:
                assert isinstance(outputs[index].error, SamplingError)
            else:
                assert outputs[index].outputs[0].text in ("yes", "no")


@pytest.mark.parametrize(
    "question", ["Where is the star?", "What do you see?", "How many shapes are there?"]
)
def test_choice_of_its_own_answer_has_the_models_tokens(question: str, demo: LLM) -> None:
    from idefics2_engine.demo import DEMO_IMAGES

    image = {"type": "image", "image": DEMO_IMAGES / "shapes.png"}
    conversation = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]

    def answer(**params: Any) -> Any:
        sampling = SamplingParams(temperature=0.0, max_tokens=60, **params)
        return demo.chat(conversation, sampling)[0].outputs[0]

    free = answer()
    bound = answer(structured_outputs={"choice": [free.text, "Nothing.", "A cat."]})
    assert bound.text == free.text
    # The choice has no end token, because nothing could follow it
    assert bound.token_ids == free.token_ids[:-1]


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(device="cpu", dtype="float32")


def test_prompt_that_ends_in_a_word_is_continued(llm: LLM) -> None:
    inside = llm.generate("A wo", SamplingParams(structured_outputs={"choice": ["rd"]}))[0]
    first = inside.outputs[0].token_ids[0]
    assert not llm.engine.tokenizer.decode([0, first]).endswith(" ")
    assert inside.outputs[0].text == "rd"


def test_without_the_library_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    plain = LLM(load_format="dummy", device="cpu", dtype="float32", max_model_len=64)
    with pytest.raises(SamplingError, match=r"pip install '.\[structured\]'"):
        plain.generate("Q:", SamplingParams(structured_outputs={"choice": ["a"]}))
    assert plain.generate("Q:", SamplingParams(max_tokens=2))[0].outputs[0].token_ids


def test_library_is_imported_on_first_use() -> None:
    program = (
        "import sys; from idefics2_engine import LLM, SamplingParams, StructuredOutputsParams; "
        "SamplingParams(structured_outputs=StructuredOutputsParams(json={})); "
        "sys.exit('llguidance' in sys.modules or 'jsonschema' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
