"""Answers of the demo checkpoint are compared on their tokens, and a wrong operation shows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine import LLM, Row, SamplingParams
from idefics2_engine.agreement import answer_comparison
from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import ConfigError, WorkerLostError
from idefics2_engine.jobs.shadow.replay import AnsweredRow, ReplayedOutput, replay_rows
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.worker_pool import WorkerPool
from idefics2_engine.outputs import RequestOutput
from idefics2_kernels import REFERENCE, Ops
from stand_in_replay import agreement_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
QUESTIONS = [("shapes.png", "Where is the star?"), ("sign.png", "Describe the image.")]


def rows(params: SamplingParams = GREEDY) -> list[Row]:
    return [
        Row(
            name,
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": str(DEMO_IMAGES / name)},
                        {"type": "text", "text": text},
                    ],
                }
            ],
            params,
        )
        for name, text in QUESTIONS
    ]


def answered(llm: LLM, asked: list[Row]) -> list[AnsweredRow]:
    by_key = {one.key: one for one in llm.iterate(asked)}
    return [
        AnsweredRow(
            row.key,
            row.prompt,
            row.sampling_params,
            tuple(tuple(one.token_ids) for one in by_key[row.key].outputs),
        )
        for row in asked
    ]


def agreement(output: RequestOutput) -> TokenAgreement:
    assert isinstance(output, ReplayedOutput)
    assert output.agreement is not None
    return output.agreement


def replayed(llm: LLM, params: SamplingParams = GREEDY) -> TokenAgreement:
    total = TokenAgreement()
    for output in replay_rows(llm, answered(llm, rows(params))):
        total.add(agreement(output))
    return total


def demo(ops: Ops) -> LLM:
    return LLM(device="cpu", max_num_seqs=4, kv_cache_tokens=2048, max_model_len=512, ops=ops)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with demo(REFERENCE) as made:
        yield made


def test_reference_agrees_with_itself_and_with_its_answers(llm: LLM) -> None:
    found = replayed(llm)
    assert found.tokens > 12
    assert found == TokenAgreement(
        found.tokens, found.tokens, greedy_tokens=found.tokens, greedy_best=found.tokens
    )


def test_only_plain_greedy_answers_are_greedy(llm: LLM) -> None:
    for params in (
        SamplingParams(temperature=0.7, max_tokens=3, n=2),
        SamplingParams(temperature=0.0, max_tokens=3, logit_bias={5: 1.0}),
        SamplingParams(temperature=0.0, max_tokens=3, min_tokens=2),
    ):
        found = replayed(llm, params)
        assert (found.same_best, found.greedy_tokens) == (found.tokens, 0)
        assert found.tokens > 2 * params.n


def test_row_that_cannot_be_read_is_an_error(llm: LLM) -> None:
    good = answered(llm, rows()[:1])
    missing = [{"role": "user", "content": [{"type": "image", "image": "missing.png"}]}]
    bad = AnsweredRow("bad", missing, GREEDY, ((1, 2),))
    outputs = list(replay_rows(llm, [bad, *good]))
    assert [one.request_id for one in outputs] == ["0", "1"]
    assert outputs[0].error is not None
    assert outputs[0].error.code == "image"
    assert agreement(outputs[1]).tokens > 0


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (torch.OutOfMemoryError("CUDA"), "request_failed", "needs more memory than there is"),
        (RuntimeError("broken"), "internal", "cannot be compared, got RuntimeError"),
    ],
)
def test_row_that_the_reference_cannot_compute_is_an_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: str, text: str
) -> None:
    asked = answered(llm, rows()[:1])

    def fail(*_args: object, **_options: object) -> TokenAgreement:
        raise raised

    monkeypatch.setattr(answer_comparison, "compare_answers", fail)
    (output,) = replay_rows(llm, asked)
    assert output.error is not None
    assert output.error.code == code
    assert text in str(output.error)


def weaker_paged_attention(*args: Any, **options: Any) -> Tensor:
    return 0.25 * REFERENCE.paged_attention(*args, **options)


def uniform_flash_attention(*args: Any, **options: Any) -> Tensor:
    return REFERENCE.flash_attention(*args, **{**options, "scale": 0.0})


def test_wrong_operation_of_every_pass_shows_in_the_logits() -> None:
    with demo(replace(REFERENCE, flash_attention=uniform_flash_attention)) as llm:
        found = replayed(llm)
    assert found.largest_kl > 0.1
    assert found.same_best < found.tokens
    assert found.largest_margin > 0


def test_wrong_operation_of_the_engine_alone_shows_in_greedy_tokens() -> None:
    """One pass without a cache does not call it, and the engine does for every token."""
    with demo(replace(REFERENCE, paged_attention=weaker_paged_attention)) as llm:
        found = replayed(llm)
    assert (found.same_best, found.largest_kl) == (found.tokens, 0.0)
    assert found.greedy_best < found.greedy_tokens
    assert found.greedy_margin > 0


def test_other_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be replayed by LLM or by an engine with replay"):
        replay_rows(object(), [])


NAME = "stand_in_replay:PooledEngine"


def test_workers_replay_rows_and_a_row_that_kills_them_is_lost() -> None:
    asked = [AnsweredRow(f"row {n}", str(n), None, ((n, n),)) for n in range(9)]
    asked[4] = AnsweredRow("row 4", "kill", None, ((1,),))
    with WorkerPool(EngineSpec({}, NAME), 2) as pool:
        # The same workers answer rows before and after
        assert len(list(pool.iterate([Row(n, "q") for n in range(5)]))) == 5
        outputs = {one.key: one for one in replay_rows(pool, asked)}
        assert len(list(pool.iterate([Row(n, "q") for n in range(5)]))) == 5
    assert outputs.keys() == {row.key for row in asked}
    assert isinstance(outputs["row 4"].error, WorkerLostError)
    for row in asked:
        if row.key != "row 4":
            assert agreement(outputs[row.key]) == agreement_of(row.key, row.answers)
