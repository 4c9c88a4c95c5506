"""Keys of rows, which outputs have as well, and the seeds that come from them."""

from typing import Any

import numpy as np
import pytest

from idefics2_engine import LLM, Row, SamplingParams
from idefics2_engine.errors import ImageError, PromptError, SamplingError
from idefics2_engine.row import row_seed
from oracle import random_image

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
DRAWN = SamplingParams(max_tokens=8, min_tokens=8)
SETTINGS = {"max_model_len": 200, "max_num_seqs": 4}


@pytest.mark.parametrize("key", [None, True, 1.5, b"a", 2**63, -(2**63) - 1, ("a", 1)])
def test_key_must_be_a_string_or_an_integer(key: Any) -> None:
    with pytest.raises(PromptError, match="key of a row must be a string or a 64-bit integer, got"):
        Row(key, "the chicken")


def test_integers_of_other_libraries_become_plain_keys() -> None:
    assert type(Row(np.int32(7), "the chicken").key) is int  # type: ignore[arg-type]


def test_outputs_have_the_keys_of_their_rows(llm: LLM) -> None:
    picture = {"prompt": "<image>", "multi_modal_data": {"image": random_image(60, 90, seed=1)}}
    broken = {"prompt": "<image>", "multi_modal_data": {"image": b"no image"}}
    rows: list[Any] = [
        Row("text", "the chicken"),
        Row(-7, [{"role": "user", "content": "what is left"}]),
        "without a key",
        ("a pair", GREEDY),
        Row("picture", picture),
        Row("refused when read", 7),  # type: ignore[arg-type]
        Row("refused when prepared", broken),
        Row("", "the car", SamplingParams(temperature=0.0, max_tokens=2, min_tokens=2)),
        Row("no parameters", "the car", "greedy"),  # type: ignore[arg-type]
    ]
    outputs = {int(output.request_id): output for output in llm.iterate(rows, GREEDY)}
    assert [outputs[place].key for place in range(len(rows))] == [
        row.key if isinstance(row, Row) else None for row in rows
    ]
    errors = {place: type(output.error) for place, output in outputs.items() if output.error}
    assert errors == {5: PromptError, 6: ImageError, 8: SamplingError}
    assert len(outputs[7].outputs[0].token_ids) == 2
    for place, prompt in ((0, "the chicken"), (4, picture)):
        wanted = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
        assert outputs[place].outputs[0].token_ids == wanted
    assert outputs[1].to_dict()["key"] == -7
    assert outputs[5].to_dict()["key"] == "refused when read"


def test_row_is_no_iterable_of_rows(llm: LLM) -> None:
    with pytest.raises(PromptError, match="prompts must be an iterable of prompts, got Row"):
        llm.iterate(Row(1, "the chicken"))  # type: ignore[arg-type]


def drawn_tokens(llm: LLM, rows: list[Any]) -> dict[Any, list[int]]:
    return {
        output.request_id if output.key is None else output.key: output.outputs[0].token_ids
        for output in llm.iterate(rows, DRAWN)
    }


def test_answer_of_a_row_does_not_depend_on_the_rows_before(llm: LLM) -> None:
    rows = [Row(f"row {i}", "the chicken sits on") for i in range(6)]
    whole = drawn_tokens(llm, rows)
    assert len({tuple(tokens) for tokens in whole.values()}) > 1
    without_first = drawn_tokens(llm, rows[1:])
    assert without_first == {key: whole[key] for key in without_first}
    backward = drawn_tokens(llm, rows[::-1])
    assert backward == whole


def test_rows_without_a_key_draw_by_their_place(llm: LLM) -> None:
    rows = ["the chicken sits on"] * 4
    first = drawn_tokens(llm, rows)
    assert len({tuple(tokens) for tokens in first.values()}) > 1
    # Other calls draw seeds of their own
    llm.generate(rows, DRAWN)
    assert drawn_tokens(llm, rows) == first
    by_key = drawn_tokens(llm, [Row(2, rows[0])])
    assert by_key == {2: first["2"]}


def test_parameters_with_a_seed_take_precedence_over_the_key(llm: LLM) -> None:
    seeded = SamplingParams(max_tokens=8, min_tokens=8, seed=5)
    one, other = drawn_tokens(llm, [Row(key, "the chicken", seeded) for key in (1, 2)]).values()
    assert one == other == llm.generate("the chicken", seeded)[0].outputs[0].token_ids


def test_seed_is_a_hash_of_job_and_row() -> None:
    """Answers of a saved job must stay the same, so the values are written down."""
    assert row_seed(0, "a1") == 9077746176619487866
    assert row_seed(0, 0) == 3073688382828665951
    ids: list[str | int] = [*range(1000), *map(str, range(1000)), "\ud800", -1, ""]
    seeds = {row_seed(job, row) for job in (0, 1, -1) for row in ids}
    assert len(seeds) == 3 * len(ids)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) >= 2**62
