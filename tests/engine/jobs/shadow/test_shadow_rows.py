"""Rows of a run are compared at its end: which, how many, and what an end in the middle leaves."""

import errno
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import Ending, JobResult, RowCounts
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.shadow import shadow_rows
from idefics2_engine.jobs.shadow.row_choice import row_rank
from idefics2_engine.jobs.shadow.shadow_figures import shadow_sentence
from idefics2_engine.jobs.shadow.shadow_file import SHADOW
from idefics2_engine.jobs.shadow.shadow_rows import MAX_TOKENS, ShadowRows
from idefics2_engine.jobs.shadow.shadow_size import shadow_size
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Row
from stand_in_replay import ReplayingEngine, agreement_of
from stand_in_run import (
    GOOD,
    ROWS,
    StandInEncoding,
    StandInEngine,
    StandInRows,
    answered,
    expected,
    run_rows,
)

BY_RANK = sorted(
    (f"row-{number}" for number, text in enumerate(ROWS) if text in GOOD),
    key=lambda id: row_rank(0, id),
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_rows, "SHARE_OF_TIME", 1e9)


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_rows, "SHARE_OF_TIME", -1.0)


def shadow_of(out: Path, size: str = "5", fingerprint: str = "f1", **options: Any) -> ShadowRows:
    return ShadowRows(out, shadow_size(size), seed=0, fingerprint=fingerprint, **options)


def job(
    out: Path,
    engine: StandInEngine,
    shadow: ShadowRows,
    texts: Sequence[str] = ROWS,
    **options: Any,
) -> JobRunner:
    return JobRunner(
        out,
        StandInRows(texts),
        engine,
        StandInEncoding(),
        JobDescription({}),
        JobOptions(**{"in_flight": 4} | options),
        shadow=shadow,
    )


def run(
    out: Path, engine: StandInEngine, shadow: ShadowRows | None = None, **options: Any
) -> JobResult:
    return job(out, engine, shadow or shadow_of(out), **options).run()


def compared(result: JobResult) -> int:
    assert result.shadow is not None
    number = result.shadow["rows"]["compared"]
    assert isinstance(number, int)
    return number


@pytest.mark.usefixtures("no_limit")
def test_chosen_rows_are_compared_on_their_tokens(out: Path) -> None:
    engine = ReplayingEngine()
    shadow = shadow_of(out)
    result = run(out, engine, shadow)
    assert out.read_bytes() == expected(ROWS)
    assert engine.replayed == BY_RANK[:5]
    assert result.shadow is not None
    assert result.shadow["rows"] == {"chosen": 5, "compared": 5}
    assert (result.shadow["tokens"], result.shadow["top1_agreement"]) == (10, 1.0)
    found = {id: agreement_of(id, [[1, 2]]).largest_kl for id in BY_RANK[:5]}
    assert result.shadow["largest_kl"] == max(found.values())
    assert result.shadow["mean_kl"] == pytest.approx(sum(found.values()) / 5)
    worst = sorted(found, key=lambda id: -found[id])
    assert [one["id"] for one in result.shadow["worst"]] == worst
    assert shadow.run[1:] == (5, 0, 0, False)


@pytest.mark.usefixtures("no_limit")
@pytest.mark.parametrize("at", [0, 10, 30, 50])
def test_interrupted_run_changes_no_choice(out: Path, at: int) -> None:
    """Rows that finished before the interrupt are compared by the run that completes the job."""
    jobs: list[JobRunner] = []
    engine = ReplayingEngine(1, on_answer=lambda n: n == at and jobs[0].interrupt())
    jobs.append(job(out, engine, shadow_of(out)))
    assert jobs[0].run().ending is Ending.INTERRUPTED
    assert engine.replayed == []
    second = ReplayingEngine(2)
    result = run(out, second)
    assert second.replayed == BY_RANK[:5]
    assert result.shadow == run(out.with_name("whole"), ReplayingEngine()).shadow


def test_tokens_are_written_before_the_row_is_journalled(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a kill costs no row that would be compared."""
    write, written = FileOperations.write, []

    def noted(files: FileOperations, fd: int, data: memoryview) -> int:
        written.append(bytes(data))
        return write(files, fd, data)

    monkeypatch.setattr(FileOperations, "write", noted)
    run(out, ReplayingEngine())
    for row in StandInRows(ROWS).rows():
        if row.id in BY_RANK[:5]:
            lines = [line for line in written if row.key.encode() in line]
            assert lines[0].startswith(b'{"fingerprint"')
            assert lines[1].startswith(b'{"v":1')


@pytest.mark.usefixtures("no_limit")
def test_run_that_was_killed_while_it_compared_goes_on(out: Path) -> None:
    class KillError(BaseException):
        pass

    def kill(key: object) -> None:
        if key == BY_RANK[2]:
            raise KillError

    with pytest.raises(KillError):
        run(out, ReplayingEngine(on_replay=kill))
    assert not out.exists()
    with (job_path(out) / SHADOW).open("ab") as file:
        file.write(b'{"fingerprint":"f1","row":7,"ke')
    # Two rows are compared, so the model is not loaded for the others
    engine = ReplayingEngine()
    result = run(out, engine)
    assert (engine.loads, compared(result)) == (0, 2)
    assert out.read_bytes() == expected(ROWS)
    # Rows that are added let it go on
    later = ReplayingEngine()
    result = run(out, later, texts=[*ROWS, "row new"])
    assert later.replayed == BY_RANK[2:5]
    assert compared(result) == 5


@pytest.mark.usefixtures("no_time")
def test_model_is_loaded_if_no_row_was_compared(out: Path) -> None:
    class KillError(BaseException):
        pass

    def kill(_key: object) -> None:
        raise KillError

    with pytest.raises(KillError):
        run(out, ReplayingEngine(on_replay=kill))
    engine = ReplayingEngine()
    result = run(out, engine)
    assert (engine.loads, engine.replayed) == (1, BY_RANK[:1])
    assert (result.run.computed, compared(result)) == (0, 1)
    assert engine.asked.total() == 0


@pytest.mark.parametrize(
    ("run_seconds", "wanted"), [(0, 1), (199, 1), (200, 2), (300, 3), (1000, 5)]
)
def test_time_ends_the_comparison_but_one_row_is_compared(
    out: Path, run_seconds: float, wanted: int
) -> None:
    """Each look at the clock is a second: one for each row, and one before the next."""
    seconds = count()
    shadow = shadow_of(out, clock=lambda: float(next(seconds)))
    job_path(out).mkdir()
    shadow.begin(RowCounts())
    for row in StandInRows(GOOD).rows():
        shadow.answer_row(row, answered(row.to_engine(), 0))
    shadow.compare(ReplayingEngine(), run_seconds, lambda: None)
    shadow.end()
    assert shadow.run.compared == wanted
    assert shadow.run.skipped == 5 - wanted
    said = shadow_sentence(shadow.figures(), shadow.run._asdict())
    assert (f"({5 - wanted} skipped: 2 % of the time was used)" in said) == (wanted < 5)


def test_interrupt_ends_the_comparison_and_not_the_job(out: Path) -> None:
    said: list[bool] = []
    jobs: list[JobRunner] = []

    def interrupt(_key: object) -> None:
        said.append(jobs[0].interrupt())
        said.append(jobs[0].interrupt())

    engine = ReplayingEngine(on_replay=interrupt)
    jobs.append(job(out, engine, shadow_of(out)))
    result = jobs[0].run()
    # The second one must end the run, where no flow could take notice
    assert said == [True, False]
    assert (result.ending, compared(result)) == (Ending.COMPLETE, 1)
    assert out.read_bytes() == expected(ROWS)
    assert result.shadow is not None
    assert result.shadow_run is not None
    sentence = shadow_sentence(result.shadow, result.shadow_run)
    assert "skipped: comparing was ended)" in sentence


@pytest.mark.usefixtures("no_limit")
def test_row_that_cannot_be_compared_costs_no_other(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shadow = shadow_of(out)
    result = run(out, ReplayingEngine(bad=BY_RANK[:2]), shadow)
    assert (compared(result), shadow.run.failed) == (3, 2)
    assert caplog.text.count("is not compared: prompt must be there") == 2


def test_engine_that_fails_costs_no_answer(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_key: object) -> None:
        raise RuntimeError("the device is gone")

    result = run(out, ReplayingEngine(on_replay=fail))
    assert (result.ending, compared(result)) == (Ending.COMPLETE, 0)
    assert out.read_bytes() == expected(ROWS)
    assert [one.levelno for one in caplog.records] == [logging.ERROR]


def test_engine_without_a_model_costs_no_answer(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(out, StandInEngine())
    assert (result.ending, compared(result)) == (Ending.COMPLETE, 0)
    assert "must be replayed by LLM or by an engine with replay, got StandInEngine" in caplog.text


@pytest.mark.usefixtures("no_limit")
def test_tokens_of_another_fingerprint_are_not_used(out: Path) -> None:
    run(out, ReplayingEngine())
    lines = (job_path(out) / SHADOW).read_text().splitlines()
    assert {json.loads(line)["fingerprint"] for line in lines} == {"f1"}
    engine = ReplayingEngine()
    result = run(out, engine, shadow_of(out, fingerprint="f2"))
    assert (engine.loads, compared(result)) == (0, 0)


def test_job_without_known_tokens_compares_nothing(out: Path) -> None:
    run_rows(out, ROWS)
    engine = ReplayingEngine()
    result = run(out, engine)
    assert result.shadow is not None
    assert result.shadow["rows"] == {"chosen": 0, "compared": 0}
    assert engine.loads == 0


@pytest.mark.usefixtures("no_time")
def test_long_and_bad_rows_are_not_chosen(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LongEngine(ReplayingEngine):
        def iterate(self, prompts: Any, **options: Any) -> Any:
            answers = super().iterate(prompts, **options)
            following = type(answers).__next__

            def long(self: Any) -> RequestOutput:
                output = following(self)
                is_long = output.key != BY_RANK[4]
                return replace(output, prompt_token_ids=[5] * (MAX_TOKENS - 2 + is_long))

            monkeypatch.setattr(type(answers), "__next__", long)
            return answers

    engine = LongEngine()
    run(out, engine)
    assert engine.replayed == [BY_RANK[4]]


@pytest.mark.usefixtures("no_time")
def test_prompts_are_those_of_the_rows(out: Path) -> None:
    found: list[Row] = []

    class Engine(ReplayingEngine):
        def replay(self, rows: Any) -> Any:
            found.extend(rows := list(rows))
            return super().replay(rows)

    run(out, Engine())
    (row,) = found
    assert (row.key, row.prompt) == (BY_RANK[0], ROWS[int(BY_RANK[0][4:])])


class LostFile(FileOperations):
    """Opens the file, and writes to it ``count`` times."""

    def __init__(self, count: int) -> None:
        self.count = count

    def write(self, fd: int, data: memoryview) -> int:
        self.count -= 1
        if self.count < 0:
            raise OSError(errno.ENOSPC, "no space")
        return super().write(fd, data)


def test_full_disk_ends_the_run_as_one_of_the_output_does(out: Path) -> None:
    result = run(out, ReplayingEngine(), shadow_of(out, files=LostFile(1)))
    assert (result.ending, result.exit_code) == (Ending.OUTPUT_LOST, 5)
    assert result.counts.rows > 0
    assert run(out, ReplayingEngine()).exit_code == 3
    assert out.read_bytes() == expected(ROWS)
