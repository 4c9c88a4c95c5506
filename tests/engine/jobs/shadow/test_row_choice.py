"""The rows that are compared hang on ids and seed alone, and there is always one."""

import random

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.shadow.row_choice import ChosenRow, RowChoice, row_rank
from idefics2_engine.jobs.shadow.shadow_size import MAX_SHADOW_ROWS, ShadowSize, shadow_size
from job_outputs import job_row

ROWS = [job_row(number) for number in range(5000)]


def chosen(size: ShadowSize, order: int = 0, seed: int = 0, num_rows: int = 5000) -> list[str]:
    choice = RowChoice(size, seed)
    for row in random.Random(order).sample(ROWS[:num_rows], num_rows):
        if (rank := choice.may_take(row)) is not None:
            choice.take(ChosenRow(rank, row, ()))
    return [str(one.row.id) for one in choice.rows()]


@pytest.mark.parametrize("size", ["1", "7", "1%", "0.01%", "100%"])
def test_order_of_finishing_changes_nothing(size: str) -> None:
    first = chosen(shadow_size(size))
    assert chosen(shadow_size(size), order=1) == first
    assert chosen(shadow_size(size), seed=1) != first


def test_numbers_and_shares() -> None:
    in_order = sorted((row.id for row in ROWS), key=lambda id: row_rank(0, id))
    assert chosen(shadow_size("7")) == in_order[:7]
    below = [id for id in in_order if row_rank(0, id) < 0.01]
    assert chosen(shadow_size("1%")) == below
    assert 30 < len(below) < 70
    assert chosen(shadow_size("100%")) == in_order[:MAX_SHADOW_ROWS]
    assert len(chosen(shadow_size("7"), num_rows=3)) == 3


def test_share_of_few_rows_is_one_row() -> None:
    lowest = min((row.id for row in ROWS[:20]), key=lambda id: row_rank(0, id))
    assert chosen(shadow_size("0.1%"), num_rows=20) == [lowest]
    assert chosen(shadow_size("0.1%"), num_rows=0) == []


def test_rows_that_are_not_needed_are_not_taken() -> None:
    """Of 5,000 rows in any order, few are ever among the lowest ones."""
    taken = 0
    choice = RowChoice(shadow_size("5"), 0)
    for row in ROWS:
        if (rank := choice.may_take(row)) is not None:
            choice.take(ChosenRow(rank, row, ()))
            taken += 1
    assert taken < 100


@pytest.mark.parametrize("text", ["0", "0%", "-1", "1001", "101%", "some", "", "1.5", "0.1 %%"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--shadow must be 1 to 1000 rows, or a percentage"):
        shadow_size(text)
