"""A full disk, a failing one and a read-only one: the run ends with exit code 5 and is resumable."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_result import Ending
from idefics2_engine.jobs.store.job_folder import job_path
from job_files import CountedFiles, FailingFiles
from paths import ROOT
from stand_in_job import num_lines
from stand_in_run import StandInEngine, expected, run_rows

TEXTS = [f"{'bad' if n % 7 == 3 else 'row'} {n}" for n in range(30)]
GOOD = sum(text.startswith("row") for text in TEXTS)
CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]


def num_calls(folder: Path) -> int:
    folder.mkdir()
    files = CountedFiles()
    run_rows(folder / "out.jsonl", TEXTS, runner_options={"files": files})
    return len(files.calls)


@pytest.mark.parametrize("code", CODES)
def test_every_call_may_fail_from_then_on(tmp_path: Path, code: int) -> None:
    calls = num_calls(tmp_path / "counted")
    for at in range(0, calls, 3):
        out = tmp_path / f"{at}.jsonl"
        files = FailingFiles(code, range(at, 10**9))
        engine = StandInEngine(at)
        result = run_rows(out, TEXTS, engine, runner_options={"files": files})
        assert (result.ending, result.exit_code) == (Ending.OUTPUT_LOST, 5), at
        assert os.strerror(code) in result.message
        assert str(tmp_path) in result.message
        # Those in flight were answered, and no others
        assert engine.asked.total() <= GOOD
        before = num_lines(job_path(out))
        again = run_rows(out, TEXTS, StandInEngine())
        assert again.exit_code == 3
        assert out.read_bytes() == expected(TEXTS)
        assert again.from_journal >= before - 1


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_flight_are_journalled_when_there_is_room_again(tmp_path: Path, seed: int) -> None:
    """One write of the journal fails, and the rows that were in flight are not lost."""
    out = tmp_path / "out.jsonl"
    run_rows(out, [])
    files = FailingFiles(errno.ENOSPC, range(0))
    texts = [text for text in TEXTS if text.startswith("row")]
    engine = StandInEngine(seed)

    class FailOnce(JobObserver):
        def finish_row(self, finished: FinishedRow) -> None:
            if finished.row.index == 9:
                files.at = range(len(files.calls), len(files.calls) + 1)

    options = {"files": files, "observers": [FailOnce()]}
    result = run_rows(out, texts, engine, runner_options=options)
    assert result.exit_code == 5
    assert engine.asked.total() < len(texts)
    assert num_lines(job_path(out)) == engine.asked.total() == result.counts.rows
    again = StandInEngine()
    run_rows(out, texts, again)
    assert again.asked.total() == len(texts) - engine.asked.total()
    assert out.read_bytes() == expected(texts)


@pytest.mark.parametrize("method", ["begin", "load", "finish_row", "end"])
def test_failing_observer_is_a_lost_output(tmp_path: Path, method: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.stats.jsonl")

    class Ends(JobObserver):
        has_ended = False

        def end(self) -> None:
            self.has_ended = True

    full, other = JobObserver(), Ends()
    setattr(full, method, fail)
    result = run_rows(tmp_path / "out.jsonl", TEXTS, runner_options={"observers": [full, other]})
    assert result.exit_code == 5
    assert result.message == "out.stats.jsonl: cannot be written: No space left on device"
    assert other.has_ended


PROGRAM = """
import sys
from pathlib import Path
from stand_in_run import run_rows
result = run_rows(Path(sys.argv[1]), [f"row {n}" for n in range(300)])
print(result.message)
sys.exit(result.exit_code)
"""


def test_limit_of_file_size(tmp_path: Path) -> None:
    """The system itself refuses to write more of a file, also to root."""
    out = tmp_path / "out.jsonl"
    limits = (8000, 8000)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'tests/helpers'}"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (5, "")
    assert "File too large" in ended.stdout
    texts = [f"row {n}" for n in range(300)]
    result = run_rows(out, texts)
    assert result.from_journal > 10
    assert out.read_bytes() == expected(texts)
