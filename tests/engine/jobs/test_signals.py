"""Ctrl-C once and twice, and SIGTERM, while a job runs."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from idefics2_engine.cli.jobs.signals import interrupts_handled
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import JobResult
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from stand_in_job import num_lines
from stand_in_run import StandInEncoding, StandInEngine, StandInRows, expected, run_rows

TEXTS = [f"row {number}" for number in range(60)]


def run_with(out: Path, on_answer: Callable[[int], None], drain_timeout: float = 30) -> JobResult:
    engine = StandInEngine(on_answer=on_answer)
    runner = JobRunner(
        out,
        StandInRows(TEXTS),
        engine,
        StandInEncoding(),
        JobDescription({}),
        JobOptions(in_flight=4, drain_timeout=drain_timeout),
    )
    with interrupts_handled(runner.interrupt):
        return runner.run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_drains(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out.jsonl"
    before = signal.getsignal(number)

    def answer(count: int) -> None:
        if count == 20:
            os.kill(os.getpid(), number)

    result = run_with(out, answer)
    assert result.exit_code == 130
    assert 20 < num_lines(job_path(out)) < len(TEXTS)
    assert signal.getsignal(number) is before
    assert run_rows(out, TEXTS).exit_code == 0
    assert out.read_bytes() == expected(TEXTS)


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The rows in flight are never answered, and would be waited for without an end."""
    out = tmp_path / "out.jsonl"
    blocked = threading.Event()

    def answer(count: int) -> None:
        if count == 20:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            blocked.wait()

    result = run_with(out, answer, drain_timeout=86400.0)
    blocked.set()
    assert result.exit_code == 130
    assert num_lines(job_path(out)) == 20


def test_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run_with(
            tmp_path / "out.jsonl", lambda _count: os.kill(os.getpid(), signal.SIGINT)
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 0


def test_signal_that_the_run_cannot_notice_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_handled(lambda: False):
        signal.raise_signal(signal.SIGTERM)


def test_handlers_are_left_alone_on_other_threads() -> None:
    found = []

    def look() -> None:
        with interrupts_handled(lambda: True):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
