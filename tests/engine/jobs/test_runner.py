"""A run from rows to output: order, errors, retries, limits, resuming, and what ends it early."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.jobs.job_errors import (
    FingerprintError,
    InputLostError,
    JobError,
    JobInUseError,
)
from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_result import Ending
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.outputs import RequestOutput
from stand_in_job import num_lines
from stand_in_run import (
    GOOD,
    ROWS,
    StandInEncoding,
    StandInEngine,
    StandInRows,
    expected,
    read_with,
    run_rows,
    runner,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("window", "in_flight"), [(1, 1), (3, 8), (None, 4), (1000, 100)])
def test_output_is_in_order_with_bad_rows(
    out: Path, seed: int, window: int | None, in_flight: int
) -> None:
    result = run_rows(out, ROWS, StandInEngine(seed), window=window, in_flight=in_flight)
    assert out.read_bytes() == expected(ROWS)
    assert (result.ending, result.exit_code) == (Ending.COMPLETE, 3)
    assert result.counts.rows == len(ROWS)
    assert result.run.computed == len(GOOD)
    assert result.counts.errors == {"schema": len(ROWS) - len(GOOD)}


def test_all_answered_is_exit_code_0(out: Path) -> None:
    result = run_rows(out, GOOD)
    assert result.exit_code == 0
    assert result.counts.completion_tokens == 2 * len(GOOD)


def test_empty_job_needs_no_engine(out: Path) -> None:
    engine = StandInEngine()
    assert run_rows(out, [], engine).exit_code == 0
    assert out.read_bytes() == b""
    assert engine.loads == 0


def test_bad_rows_alone_need_no_engine(out: Path) -> None:
    engine = StandInEngine()
    assert run_rows(out, ["bad 1", "bad 2"], engine).exit_code == 3
    assert engine.loads == 0


def test_finished_job_ends_at_once(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("60 rows")
    run_rows(out, ROWS, source=source)
    result = run_rows(out, read_with(ROWS, 0, pytest.fail), source=source)
    assert (result.ending, result.exit_code) == (Ending.COMPLETE_BEFORE, 0)
    assert result.counts.rows == len(ROWS)
    source.write_text("60 rows and one")
    assert run_rows(out, [*ROWS, "new"], source=source).run.computed == 1


def test_finished_job_without_files_reads_its_rows(out: Path) -> None:
    run_rows(out, ROWS)
    engine = StandInEngine()
    result = run_rows(out, ROWS, engine)
    assert (result.ending, result.exit_code) == (Ending.COMPLETE, 3)
    assert result.from_journal == len(ROWS)
    assert engine.loads == 0


def test_engine_has_at_most_in_flight_rows(out: Path) -> None:
    engine = StandInEngine()
    run_rows(out, GOOD, engine, in_flight=5)
    assert engine.most_in_flight <= 5


def test_reading_stops_a_window_behind_the_oldest_row(out: Path) -> None:
    """The first row is answered after every other row that the window allows."""
    window, read = 10, []
    rows = StandInRows(GOOD)
    engine = StandInEngine(
        held={GOOD[0]: window - 1}, on_answer=lambda number: read.append(rows.num_read)
    )
    result = runner(out, engine, rows, window=window, in_flight=3).run()
    assert result.exit_code == 0
    assert max(read[:window]) <= window
    assert out.read_bytes() == expected(GOOD)


@pytest.mark.parametrize("code", ["request_failed", "worker_lost", "media_fetch"])
def test_passing_errors_are_retried_once(out: Path, code: str) -> None:
    engine = StandInEngine(failures={GOOD[0]: [code], GOOD[7]: [code, code], GOOD[-1]: [code]})
    result = run_rows(out, GOOD, engine, window=3)
    assert out.read_bytes() == expected(GOOD, {GOOD[7]: code})
    assert result.run.repeated == 3
    assert engine.asked[GOOD[7]] == 2


def test_other_errors_are_not_retried(out: Path) -> None:
    engine = StandInEngine(failures={GOOD[4]: ["image"]})
    run_rows(out, GOOD, engine)
    assert out.read_bytes() == expected(GOOD, {GOOD[4]: "image"})
    assert engine.asked[GOOD[4]] == 1


@pytest.mark.parametrize("retries", [0, 3])
def test_number_of_retries(out: Path, retries: int) -> None:
    engine = StandInEngine(failures={GOOD[4]: ["media_fetch"] * 9})
    run_rows(out, GOOD, engine, retries=retries)
    assert engine.asked[GOOD[4]] == retries + 1


@pytest.mark.parametrize(
    ("codes", "again"),
    [((), ["image", "prompt"]), (("image",), ["image"]), (("json",), [])],
)
def test_error_rows_of_an_earlier_run_are_computed_again(
    out: Path, codes: tuple[str, ...], again: list[str]
) -> None:
    texts = [*ROWS, "image", "prompt"]
    run_rows(out, texts, StandInEngine(failures={"image": ["image"], "prompt": ["prompt"]}))
    engine = StandInEngine()
    result = run_rows(out, texts, engine, retry_errors=codes)
    left = {code: code for code in ("image", "prompt") if code not in again}
    assert sorted(engine.asked) == again
    assert out.read_bytes() == expected(texts, left)
    assert result.from_journal == len(texts) - len(again)
    # The newest record counts, also without the option
    out.unlink()
    engine = StandInEngine()
    run_rows(out, texts, engine)
    assert not engine.asked
    assert out.read_bytes() == expected(texts, left)


def test_error_rows_stay_without_retry_errors(out: Path) -> None:
    failures = {GOOD[0]: ["image"]}
    with pytest.raises(RuntimeError):
        run_rows(out, GOOD, StandInEngine(failures=failures, on_answer=fail_at(20)))
    engine = StandInEngine()
    run_rows(out, GOOD, engine)
    assert GOOD[0] not in engine.asked
    assert out.read_bytes() == expected(GOOD, {GOOD[0]: "image"})


def test_failing_engine_costs_no_finished_row(out: Path) -> None:
    with pytest.raises(RuntimeError, match="broke"):
        run_rows(out, GOOD, StandInEngine(on_answer=fail_at(20)))
    assert num_lines(job_path(out)) == 20
    engine = StandInEngine()
    run_rows(out, GOOD, engine)
    assert engine.asked.total() == len(GOOD) - 20
    assert out.read_bytes() == expected(GOOD)


def test_engine_that_ends_too_early_is_an_error(out: Path) -> None:
    class Short(StandInEngine):
        def iterate(self, *args: Any, **options: Any) -> Any:
            answers = super().iterate(*args, **options)
            answers.drain()
            return answers

    with pytest.raises(RuntimeError, match="must answer"):
        run_rows(out, GOOD, Short())


def test_lost_input_ends_the_job_after_the_rows_before(out: Path) -> None:
    def texts() -> Iterator[str]:
        yield from GOOD[:10]
        raise OSError(5, "Input/output error")

    with pytest.raises(InputLostError, match="cannot be read: Input/output error"):
        run_rows(out, texts())
    assert num_lines(job_path(out)) == 10


def test_two_runners_of_one_job(out: Path) -> None:
    engine = StandInEngine()
    refused = []

    def answer(number: int) -> None:
        if number == 10:
            with pytest.raises(JobInUseError, match="process") as error:
                run_rows(out, GOOD)
            refused.append(error)

    engine.on_answer = answer
    assert run_rows(out, GOOD, engine).exit_code == 0
    assert refused


def test_other_fingerprint(out: Path) -> None:
    run_rows(out, GOOD, parts={"seed": 1})
    with pytest.raises(FingerprintError, match="seed"):
        run_rows(out, GOOD, parts={"seed": 2})
    assert run_rows(out, GOOD, parts={"seed": 2}, restart=True).exit_code == 0


def test_rows_that_changed_or_were_added_are_computed(out: Path) -> None:
    run_rows(out, GOOD)
    texts = [*GOOD, "new"]
    texts[5] = "changed"
    out.unlink()
    engine = StandInEngine()
    run_rows(out, texts, engine)
    assert sorted(engine.asked) == ["changed", "new"]
    assert out.read_bytes() == expected(texts)


def test_output_must_be_apart_from_the_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    with pytest.raises(JobError, match="apart"):
        runner(path, StandInEngine(), StandInRows(GOOD, (path,))).run()


def test_clock_that_steps_back(out: Path) -> None:
    times = iter(range(10**6, 0, -1))
    result = run_rows(out, GOOD, runner_options={"clock": lambda: float(next(times))})
    assert result.exit_code == 0
    assert out.read_bytes() == expected(GOOD)


def test_answer_without_json_is_an_internal_error(out: Path) -> None:
    class Encoding(StandInEncoding):
        def answer(self, row: Any, output: RequestOutput) -> bytes:
            if row.index == 5:
                raise ValueError("Out of range float values are not JSON compliant")
            return super().answer(row, output)

    job = JobRunner(out, StandInRows(GOOD), StandInEngine(), Encoding(), JobDescription({}))
    result = job.run()
    assert result.counts.errors == {"internal": 1}
    assert b"Out of range" not in out.read_bytes()


def test_observers_see_every_row_once(out: Path) -> None:
    class Seen(JobObserver):
        def __init__(self) -> None:
            self.rows: list[FinishedRow] = []

        def finish_row(self, finished: FinishedRow) -> None:
            self.rows.append(finished)

    failures = {GOOD[3]: ["media_fetch"]}
    run_rows(out, GOOD[:10])
    seen = Seen()
    run_rows(
        out, [*GOOD, "bad"], StandInEngine(failures=failures), runner_options={"observers": [seen]}
    )
    by_row = {one.row.index: one.attempts for one in seen.rows}
    assert len(seen.rows) == len(by_row) == len(GOOD) + 1
    assert [by_row[row] for row in (0, 9, 10, len(GOOD))] == [0, 0, 1, 0]


def test_completion_is_told_under_the_lock(out: Path) -> None:
    def complete(_result: Any, _job: Any) -> None:
        assert out.read_bytes() == expected(GOOD)
        with pytest.raises(JobInUseError):
            run_rows(out, GOOD)
        told.append(1)

    told: list[int] = []
    run_rows(out, GOOD, runner_options={"on_complete": complete})
    assert told


def fail_at(number: int) -> Any:
    def answer(count: int) -> None:
        if count == number:
            raise RuntimeError("the engine broke")

    return answer
