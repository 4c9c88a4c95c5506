"""Faults of the system in every call of a run that writes gzip, Zstandard, Parquet or results."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import JobResult
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.row_encoding import OutputEncoding
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.jobs.writers.formats import make_format
from idefics2_engine.jobs.writers.row_output import SaveOptions
from idefics2_engine.outputs import RequestOutput
from job_files import CountedFiles, FailingFiles, Killed, KilledFiles, ShortFiles
from stand_in_job import num_lines
from stand_in_run import StandInEngine, StandInRows

TEXTS = [f"{'bad' if n % 4 == 1 else 'row'} {n}" for n in range(8)]
FORMATS = ["auto out.jsonl.gz", "auto out.jsonl.zst", "auto out.parquet", "openai out.jsonl.gz"]
NEVER = 10**9


class Encoding(OutputEncoding):
    """Gives answers of the stand-in what the formats write."""

    def answer(self, row: JobRow, output: RequestOutput) -> bytes:
        return super().answer(row, replace(output, prompt_token_ids=[1, 2, 3], error=None))


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    kind, name = str(request.param).split()
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    return f"{kind} {name}"


def run(folder: Path, name: str, files: FileOperations, engine: StandInEngine) -> JobResult:
    folder.mkdir(exist_ok=True)
    kind, file = name.split()
    save = SaveOptions()
    formed = make_format(Path(file), kind, save, model="m", fingerprint="f")
    return JobRunner(
        folder / file,
        StandInRows(TEXTS),
        engine,
        Encoding(save, formed, None),
        JobDescription({}),
        JobOptions(in_flight=2),
        files=files,
    ).run()


def output(folder: Path, name: str) -> bytes:
    return (folder / name.split()[1]).read_bytes()


def journal(folder: Path, name: str) -> Path:
    return job_path(folder / name.split()[1])


def finish(folder: Path, name: str, wanted: bytes) -> None:
    """Resume a job, which computes no row again that is in its journal."""
    has_journal = journal(folder, name).exists()
    before = num_lines(journal(folder, name)) if has_journal else 0
    engine = StandInEngine(1)
    assert run(folder, name, CountedFiles(), engine).exit_code == 3
    assert output(folder, name) == wanted
    # No row of the journal is computed again
    assert engine.asked.total() <= len(TEXTS) - before


@pytest.fixture
def whole(tmp_path: Path, name: str) -> tuple[bytes, list[str]]:
    """Return the output of a run without faults, and the calls of the run."""
    files = CountedFiles()
    assert run(tmp_path / "whole", name, files, StandInEngine()).exit_code == 3
    return output(tmp_path / "whole", name), files.calls


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_kill_in_any_call(
    tmp_path: Path, name: str, share: float, whole: tuple[bytes, list[str]]
) -> None:
    wanted, calls = whole
    assert {"rename", "sync_folder", "sync", "write"} <= set(calls)
    for at in range(len(calls)):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            run(folder, name, KilledFiles(at, share), StandInEngine(at))
        finish(folder, name, wanted)


def test_short_writes_change_no_byte(
    tmp_path: Path, name: str, whole: tuple[bytes, list[str]]
) -> None:
    for most in (1, 7):
        run(tmp_path / str(most), name, ShortFiles(most), StandInEngine(most))
        assert output(tmp_path / str(most), name) == whole[0]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_calls_end_the_run_and_cost_no_row(
    tmp_path: Path, name: str, code: int, whole: tuple[bytes, list[str]]
) -> None:
    wanted, calls = whole
    for at in [at for at, call in enumerate(calls) if call != "write" or at % 3 == 0]:
        folder = tmp_path / str(at)
        result = run(folder, name, FailingFiles(code, range(at, NEVER)), StandInEngine(at))
        assert result.exit_code == 5, calls[at]
        assert os.strerror(code) in result.message
        finish(folder, name, wanted)


def test_torn_tail_at_every_byte(tmp_path: Path, name: str, whole: tuple[bytes, list[str]]) -> None:
    """The output is not there yet, and the journal's last record is cut."""
    first = tmp_path / "whole"
    (first / name.split()[1]).unlink()
    (segment,) = journal(first, name).glob("journal-*.jsonl")
    data = segment.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for end in range(last, len(data), 3):
        folder = tmp_path / str(end)
        shutil.copytree(first, folder)
        (journal(folder, name) / segment.name).write_bytes(data[:end])
        engine = StandInEngine()
        assert run(folder, name, CountedFiles(), engine).exit_code == 3
        assert engine.asked.total() <= 1
        assert output(folder, name) == whole[0]
