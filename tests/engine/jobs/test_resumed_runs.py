"""A resumed run: its engine has rows before those of the journal are compared with the input."""

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.cli.jobs.report import result_lines
from idefics2_engine.jobs.job_errors import InputLostError, JobError
from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import Ending
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.known_rows import KnownRows
from idefics2_engine.jobs.row_feed import RowFeed
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from stand_in_job import num_lines
from stand_in_run import (
    GOOD,
    StandInEncoding,
    StandInEngine,
    StandInRows,
    expected,
    run_rows,
    runner,
    void,
)

KNOWN = [f"{'bad' if n % 7 == 3 else 'row'} {n}" for n in range(60)]
NEW = [f"new {n}" for n in range(30)]
# A test that would wait forever without the code fails
SECONDS = 60


class HeldRows(StandInRows):
    """Rows of which the known ones are read once ``is_free``, after a call for each of them.

    The thread that waits takes no answers meanwhile.
    """

    def __init__(self, texts: list[str], on_known: Callable[[int], object] = id) -> None:
        super().__init__(texts)
        self.is_free = threading.Event()
        self.on_known = on_known

    def free_before(self, answer: int) -> Callable[[int], None]:
        """Return a function of the number of an answer, which lets known rows be read."""

        def free(number: int) -> None:
            if number >= answer:
                self.is_free.set()

        return free

    def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
        for row in super().rows(begin=begin):
            if not begin:
                assert self.is_free.wait(SECONDS)
                self.on_known(row.index)
            yield row


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output of a job with rows in its journal, which is not complete."""
    out = tmp_path / "out.jsonl"
    run_rows(out, KNOWN)
    out.unlink()
    return out


def test_all_new_rows_are_answered_before_a_known_one_is_read(out: Path) -> None:
    rows = HeldRows([*KNOWN, *NEW])
    engine = StandInEngine(on_answer=rows.free_before(len(NEW) - 1))
    result = runner(out, engine, rows, window=len(NEW), in_flight=len(NEW)).run()
    assert result.exit_code == 3
    assert out.read_bytes() == expected([*KNOWN, *NEW])
    assert set(engine.asked) == set(NEW)
    assert (result.from_journal, result.run.rows) == (len(KNOWN), len(NEW))


def test_input_that_must_be_read_in_order_is_read_once(out: Path) -> None:
    rows = StandInRows([*KNOWN, *NEW])
    rows.can_skip = False
    engine = StandInEngine()
    assert runner(out, engine, rows).run().exit_code == 3
    assert out.read_bytes() == expected([*KNOWN, *NEW])
    assert rows.num_read == len(KNOWN) + len(NEW)
    assert set(engine.asked) == set(NEW)


def test_known_row_that_is_computed_again_stops_no_new_row(out: Path) -> None:
    texts = ["changed", *KNOWN[1:], *NEW]
    engine = StandInEngine(held={"changed": len(NEW)})
    assert runner(out, engine, texts, window=3).run().exit_code == 3
    assert out.read_bytes() == expected(texts)
    assert engine.asked.total() == 1 + len(NEW)


@pytest.mark.parametrize("begin", [0, len(GOOD)])
def test_window_begins_at_the_first_row_that_is_not_finished(begin: int) -> None:
    """Rows before those of the feed, which are written late, do not stop it."""
    read: list[int] = []
    feed = RowFeed(
        StandInRows([*GOOD, *NEW]).rows(begin=begin),
        begin=begin,
        window=3,
        in_flight=9,
        find=lambda row: None,
        on_read=lambda one: read.append(one.row.index - begin),
    )
    for finished in range(5):
        feed.advance(begin + finished, finished if begin else begin + finished)
        while len(read) < finished + 3:
            next(feed)
    assert read == list(range(7))
    feed.drain()
    assert not list(feed)


def test_feed_ends_when_the_rows_before_it_are_written() -> None:
    rows = list(StandInRows([*GOOD, *NEW]).rows())
    last = len(rows) - 1
    feed = RowFeed(
        rows[last:], begin=last, window=3, in_flight=9, find=lambda row: None, on_read=void
    )
    assert next(feed).key == rows[last].id
    feed.finish()
    feed.advance(last + 1, last)
    feed.repeat(rows[last - 1])
    assert next(feed).key == rows[last - 1].id
    feed.finish()
    feed.advance(last + 1, last + 1)
    assert not list(feed)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_known_rows_that_changed_are_computed_a_few_at_a_time(out: Path, in_flight: int) -> None:
    texts = [text.replace("row", "changed") for text in KNOWN] + NEW
    open_rows: set[int] = set()
    most_open = 0

    class Finished(JobObserver):
        def finish_row(self, finished: FinishedRow) -> None:
            open_rows.discard(finished.row.index)

    def read(index: int) -> None:
        nonlocal most_open
        open_rows.add(index)
        most_open = max(most_open, len(open_rows))

    rows = HeldRows(texts, read)
    rows.is_free.set()
    engine = StandInEngine()
    job = JobRunner(
        out,
        rows,
        engine,
        StandInEncoding(),
        JobDescription({}),
        JobOptions(in_flight=in_flight, window=4),
        observers=[Finished()],
    )
    result = job.run()
    assert result.from_journal == sum(text.startswith("bad") for text in KNOWN)
    assert out.read_bytes() == expected(texts)
    assert engine.most_in_flight <= in_flight
    assert set(engine.asked.values()) == {1}
    assert most_open == in_flight


def test_rows_in_front_of_all_others_are_computed(out: Path) -> None:
    """Every row of the journal has another place, so none counts."""
    texts = ["first", *KNOWN, *NEW]
    engine = StandInEngine()
    assert run_rows(out, texts, engine).exit_code == 3
    assert out.read_bytes() == expected(texts)


@pytest.mark.parametrize("retried", [(), ("image",)])
def test_errors_of_known_rows_are_computed_again(tmp_path: Path, retried: tuple[str, ...]) -> None:
    out = tmp_path / "out.jsonl"
    failures = {KNOWN[number]: ["image"] for number in (0, 11, 58)}
    run_rows(out, KNOWN, StandInEngine(failures=failures))
    engine = StandInEngine()
    assert run_rows(out, [*KNOWN, *NEW], engine, retry_errors=retried).exit_code == 3
    assert out.read_bytes() == expected([*KNOWN, *NEW])
    assert set(engine.asked) == {*failures, *NEW}


def test_known_rows_that_cannot_be_read_cost_none_that_is_in_flight(out: Path) -> None:
    def fail(index: int) -> None:
        if index == 20:
            raise OSError(5, "Input/output error")

    rows = HeldRows([*KNOWN, *NEW], fail)
    engine = StandInEngine(on_answer=rows.free_before(4))
    with pytest.raises(InputLostError, match="Input/output error"):
        runner(out, engine, rows, in_flight=5).run()
    assert num_lines(job_path(out)) == len(KNOWN) + engine.asked.total()
    run_rows(out, [*KNOWN, *NEW])
    assert out.read_bytes() == expected([*KNOWN, *NEW])
    assert num_lines(job_path(out)) == len(KNOWN) + len(NEW)


def test_interrupt_before_known_rows_are_read(out: Path) -> None:
    rows = HeldRows([*KNOWN, *NEW])

    def answer(number: int) -> None:
        if number == 3:
            job.interrupt()
            rows.is_free.set()

    job = runner(out, StandInEngine(on_answer=answer), rows)
    result = job.run()
    assert (result.ending, result.exit_code) == (Ending.INTERRUPTED, 130)
    assert result.counts.rows - result.run.rows + result.num_unchecked == len(KNOWN)
    said = f"{result.num_unchecked} more rows in the journal were not looked at"
    assert (said in result_lines(result, out)) == (result.num_unchecked > 0)
    assert num_lines(job_path(out)) == len(KNOWN) + result.run.rows
    run_rows(out, [*KNOWN, *NEW])
    assert out.read_bytes() == expected([*KNOWN, *NEW])


@pytest.mark.parametrize(("limit", "code"), [("10%", 3), ("5%", 4), (60, 3), (50, 4)])
def test_share_of_errors_is_one_of_all_rows(tmp_path: Path, limit: object, code: int) -> None:
    """51 of 600 rows fail, and none of the known ones is read until 250 new rows are answered."""
    known = [f"row {number}" for number in range(300)]
    new = [f"new {number}" for number in range(300)]
    out = tmp_path / "out.jsonl"
    run_rows(out, known)
    out.unlink()
    rows = HeldRows([*known, *new])
    failures = {text: ["image"] for text in new[:51]}
    engine = StandInEngine(failures=failures, on_answer=rows.free_before(250))
    job = runner(out, engine, rows, max_errors=limit, window=300, in_flight=300)
    assert job.run().exit_code == code


def test_known_rows_alone_need_no_engine(out: Path) -> None:
    engine = StandInEngine()
    assert run_rows(out, KNOWN, engine).exit_code == 3
    assert out.read_bytes() == expected(KNOWN)
    run_rows(out, KNOWN[:20], engine)
    assert engine.loads == 0


def test_input_that_becomes_shorter_ends_the_run(out: Path) -> None:
    class Shorter(StandInRows):
        def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
            return super().rows(begin=begin) if begin else islice(super().rows(), 40)

    with pytest.raises(InputLostError, match="changed while it was read"):
        runner(out, StandInEngine(), Shorter([*KNOWN, *NEW]), window=4).run()
    run_rows(out, [*KNOWN, *NEW])
    assert out.read_bytes() == expected([*KNOWN, *NEW])


def test_damaged_input_ends_the_reading_of_known_rows() -> None:
    def damaged() -> Iterator[JobRow]:
        yield from StandInRows(KNOWN[:2]).rows()
        raise JobError("in.parquet: damaged")

    known = KnownRows(damaged(), 5)
    assert [row.index for row in known.read()] == [0, 1]
    assert str(known.error) == "in.parquet: damaged"
    assert not known.may_read


def test_open_rows_stop_the_reading_of_known_rows() -> None:
    known = KnownRows(StandInRows(KNOWN).rows(), 5, most_open=2)
    first: Any = []
    for row in known.read():
        first.append(row)
        known.open(row)
    assert [row.index for row in first] == [0, 1]
    assert not known.may_read
    known.close(first[0])
    assert [row.index for row in known.read()] == [2, 3, 4]
    assert (known.num_left, known.error) == (0, None)
