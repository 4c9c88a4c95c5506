"""What ends a run before all rows are finished: too many errors, and interrupts."""

import threading
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.jobs.job_result import Ending
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_folder import job_path
from stand_in_job import num_lines
from stand_in_run import (
    GOOD,
    StandInEngine,
    StandInRows,
    expected,
    read_with,
    run_rows,
    runner,
    void,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_too_many_errors_end_the_job_after_200_rows(out: Path) -> None:
    texts = [f"row {number}" for number in range(1000)]
    failures = {text: ["image"] for text in texts[::2]}
    result = run_rows(out, texts, StandInEngine(failures=failures), max_errors="40%")
    assert (result.ending, result.exit_code) == (Ending.TOO_MANY_ERRORS, 4)
    assert 200 <= result.counts.rows <= 200 + 4
    assert "--max-errors" in result.message
    assert not out.exists()
    result = run_rows(out, texts, max_errors="60%")
    assert result.exit_code == 3
    assert result.from_journal >= 200


@pytest.mark.parametrize(("limit", "code"), [(9, 4), (10, 3), ("10", 3)])
def test_number_of_errors(out: Path, limit: object, code: int) -> None:
    texts = [f"row {number}" for number in range(300)]
    failures = {text: ["image"] for text in texts[:10]}
    engine = StandInEngine(failures=failures)
    assert run_rows(out, texts, engine, max_errors=limit).exit_code == code


def test_first_interrupt_drains(out: Path) -> None:
    engine = StandInEngine()
    job = runner(out, engine, GOOD)
    engine.on_answer = lambda number: void(number == 20 and job.interrupt())
    result = job.run()
    assert (result.ending, result.exit_code) == (Ending.INTERRUPTED, 130)
    # Every row that the engine was asked for is in the journal
    assert num_lines(job_path(out)) == engine.asked.total() < len(GOOD)
    assert not out.exists()
    assert run_rows(out, GOOD).exit_code == 0
    assert out.read_bytes() == expected(GOOD)


def test_second_interrupt_ends_at_once(out: Path) -> None:
    """The engine never answers the rows that it has by then."""
    blocked = threading.Event()

    def answer(number: int) -> None:
        if number == 20:
            job.interrupt()
            job.interrupt()
            blocked.wait()

    engine = StandInEngine(on_answer=answer)
    job = runner(out, engine, GOOD)
    result = job.run()
    blocked.set()
    assert result.exit_code == 130
    assert num_lines(job_path(out)) == 20
    assert run_rows(out, GOOD).exit_code == 0
    assert out.read_bytes() == expected(GOOD)


def test_drain_has_a_timeout(out: Path) -> None:
    blocked = threading.Event()

    def answer(number: int) -> None:
        if number == 20:
            job.interrupt()
            blocked.wait()

    job = runner(out, StandInEngine(on_answer=answer), GOOD, drain_timeout=0.0)
    assert job.run().exit_code == 130
    blocked.set()
    assert num_lines(job_path(out)) == 20


def test_retryable_errors_of_a_drain_are_left_to_the_next_run(out: Path) -> None:
    engine = StandInEngine(failures={text: ["media_fetch"] for text in GOOD[20:]})
    job = runner(out, engine, GOOD)
    engine.on_answer = lambda number: void(number == 15 and job.interrupt())
    job.run()
    assert run_rows(out, GOOD).exit_code == 0
    assert out.read_bytes() == expected(GOOD)


def test_interrupt_before_the_engine_is_loaded(out: Path) -> None:
    engine = StandInEngine()
    run_rows(out, GOOD[:10])
    job: JobRunner
    rows = StandInRows(read_with(GOOD, 3, lambda: void(job.interrupt())))
    job = runner(out, engine, rows)
    assert job.run().exit_code == 130
    assert engine.loads == 0


def test_keyboard_interrupt_while_the_engine_is_loaded(out: Path) -> None:
    class Loading(StandInEngine):
        def __enter__(self) -> Any:
            assert not job.interrupt()
            raise KeyboardInterrupt

    job = runner(out, Loading(), GOOD)
    assert job.run().exit_code == 130
