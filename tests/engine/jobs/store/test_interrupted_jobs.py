"""Whole jobs that are killed, lose power or get errors from the system in every call."""

import errno
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import stand_in_job
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_folder import job_path
from job_files import (
    CountedFiles,
    FailingFiles,
    Killed,
    KilledFiles,
    PowerLossFiles,
    ShortFiles,
)
from stand_in_job import expected, journalled, num_lines, run_job

NEVER = 10**9
ROWS = [f"row {number}" for number in range(6)]


def num_calls(out: Path, rows: list[str] = ROWS) -> int:
    """Run a job without interruption; return its number of calls."""
    files = CountedFiles()
    run_job(out, rows, files=files)
    assert out.read_bytes() == expected(rows)
    return len(files.calls)


def finish(out: Path, rows: list[str] = ROWS) -> None:
    """Resume a job, and check that its output is right and nothing was computed needlessly."""
    known = journalled(job_path(out), rows) if job_path(out).exists() else set()
    computed = run_job(out, rows, files=CountedFiles(), seed=1)
    assert out.read_bytes() == expected(rows)
    assert sorted(computed) == sorted(set(range(len(rows))) - known)
    assert not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_job_that_is_killed_in_any_call_is_finished(share: float, tmp_path: Path) -> None:
    calls = num_calls(tmp_path / "whole.jsonl")
    assert calls > 20
    for at in range(calls):
        out = tmp_path / f"{at}.jsonl"
        with pytest.raises(Killed):
            run_job(out, ROWS, files=KilledFiles(at, share))
        finish(out)
        assert num_lines(job_path(out)) == len(ROWS)


def test_job_that_is_killed_again_and_again_is_finished(tmp_path: Path) -> None:
    """Each start is killed in a call that is later by one, until one is not killed."""
    out, deaths = tmp_path / "out.jsonl", 0
    while True:
        try:
            run_job(out, ROWS, files=KilledFiles(deaths, deaths % 3 / 2), seed=deaths)
            break
        except Killed:
            deaths += 1
    assert deaths > 10
    finish(out)
    assert num_lines(job_path(out)) == len(ROWS)


def test_finished_job_that_grows_is_killed_in_any_call(tmp_path: Path) -> None:
    """The earlier output is at its place until the new one replaces it."""
    first = tmp_path / "first"
    first.mkdir()
    num_calls(first / "out.jsonl", ROWS[:3])
    files = CountedFiles()
    shutil.copytree(first, tmp_path / "whole")
    run_job(tmp_path / "whole/out.jsonl", ROWS, files=files)
    for at in range(len(files.calls)):
        out = tmp_path / str(at) / "out.jsonl"
        shutil.copytree(first, out.parent)
        with pytest.raises(Killed):
            run_job(out, ROWS, files=KilledFiles(at, 0.5))
        assert out.read_bytes() in (expected(ROWS[:3]), expected(ROWS))
        finish(out)


def test_restart_that_is_killed_in_any_call_destroys_nothing(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    num_calls(first / "out.jsonl")
    old = (first / "out.jsonl.job/journal-00000.jsonl").read_bytes()
    for at in range(99):
        out = tmp_path / str(at) / "out.jsonl"
        shutil.copytree(first, out.parent)
        killed = False
        try:
            run_job(out, ["another"], files=KilledFiles(at), restart=True)
        except Killed:
            killed = True
        everything = [path.read_bytes() for path in out.parent.rglob("*") if path.is_file()]
        assert old in everything
        assert expected(ROWS) in everything
        run_job(out, ["another"], files=CountedFiles())
        assert out.read_bytes() == expected(["another"])
        if not killed:
            break
    assert 20 < at < 98


@pytest.mark.parametrize("names", [False, True])
def test_job_that_loses_power_in_any_call_is_finished(names: bool, tmp_path: Path) -> None:
    """Only what was synced survives, and renames may or may not."""
    calls = num_calls(tmp_path / "whole.jsonl")
    synced = 0
    # The last one is finished before
    for at in range(calls + 1):
        disk, after = tmp_path / f"{at}-disk", tmp_path / f"{at}-after"
        disk.mkdir()
        files = PowerLossFiles(disk, at, names)
        with suppress(Killed):
            run_job(disk / "out.jsonl", ROWS, files=files)
            assert at == calls
        after.mkdir()
        for path, content in files.survivors():
            if content is None:
                (after / path).mkdir()
            else:
                (after / path).write_bytes(content)
        out = after / "out.jsonl"
        if out.exists():
            assert out.read_bytes() == expected(ROWS)
        if job_path(out).exists():
            known = journalled(job_path(out), ROWS)
            # Every other row was synced, so one row at most is lost, and one more that was begun
            assert len(known) >= len(journalled(job_path(disk / "out.jsonl"), ROWS)) - 4
            synced = max(synced, len(known))
        finish(out)
    assert synced == len(ROWS)


def test_power_loss_is_noticed_without_syncs(tmp_path: Path) -> None:
    """The negative control: a rename that is on the disk before its file's content."""

    class Unsynced(PowerLossFiles):
        def sync(self, fd: int) -> None:
            self.count("sync", fd)

    files = Unsynced(tmp_path, NEVER)
    run_job(tmp_path / "out.jsonl", ROWS, files=files)
    assert dict(files.survivors())[Path("out.jsonl")] == b""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("lasts", [False, True])
def test_job_with_an_error_in_any_call_is_finished(code: int, lasts: bool, tmp_path: Path) -> None:
    calls = num_calls(tmp_path / "whole.jsonl")
    for at in range(calls):
        out = tmp_path / f"{at}.jsonl"
        files = FailingFiles(code, range(at, NEVER if lasts else at + 1))
        with pytest.raises(OSError, match=r"No space left|Input/output|Read-only"):
            run_job(out, ROWS, files=files)
        finish(out)


def test_output_does_not_depend_on_short_writes_order_and_window(tmp_path: Path) -> None:
    for seed in range(20):
        out = tmp_path / f"{seed}.jsonl"
        run_job(
            out,
            ROWS,
            files=ShortFiles(1 + seed),
            seed=seed,
            window=seed % 4,
            in_flight=1 + seed % 5,
        )
        assert out.read_bytes() == expected(ROWS)


def test_kill_between_rename_and_sync_of_the_folder(tmp_path: Path) -> None:
    class KilledAfterRename(FileOperations):
        renamed = False

        def rename(self, old: Path, new: Path) -> None:
            super().rename(old, new)
            self.renamed = new.name == "out.jsonl"

        def sync_folder(self, path: Path) -> None:
            if self.renamed:
                raise Killed
            super().sync_folder(path)

    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run_job(out, ROWS, files=KilledAfterRename())
    assert out.read_bytes() == expected(ROWS)
    # The rename is lost, or it is not
    shutil.copytree(tmp_path, tmp_path / "lost")
    (tmp_path / "lost/out.jsonl").rename(tmp_path / "lost/out.jsonl.partial")
    finish(out)
    finish(tmp_path / "lost/out.jsonl")


def test_real_kills(tmp_path: Path) -> None:
    command = [sys.executable, stand_in_job.__file__, str(tmp_path), "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["dead"] == 200
    assert counts["jobs"] >= 10
