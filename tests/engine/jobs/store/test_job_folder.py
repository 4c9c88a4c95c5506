"""The folder of a job: its lock, what resumes it, and that nothing that exists is destroyed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from idefics2_engine.jobs.job_errors import FingerprintError, JobError, JobInUseError
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.input_files import (
    InputChange,
    changed_inputs,
    check_apart,
    identify_inputs,
)
from idefics2_engine.jobs.store.job_description import JobDescription, read_description
from idefics2_engine.jobs.store.job_folder import JobFolder
from idefics2_engine.jobs.store.job_lock import Holder, JobLock, read_holder
from idefics2_engine.jobs.store.job_outputs import WrittenOutput, add_output, read_outputs
from idefics2_engine.jobs.store.job_status import read_status
from stand_in_job import expected, run_job

ROWS = [f"row {number}" for number in range(6)]
JOB = JobDescription({"seed": 0, "sampling": {"top_p": 1.0}})
HERE = Holder(os.getpid(), socket.gethostname())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_job_begins_resumes_and_finishes(out: Path) -> None:
    assert sorted(run_job(out, ROWS)) == list(range(6))
    assert out.read_bytes() == expected(ROWS)
    assert names(out) == ["out.jsonl", "out.jsonl.job"]
    assert run_job(out, ROWS) == []
    with JobFolder(out, JobDescription({})) as folder:
        assert folder.finished
        assert folder.finished.rows == 6


def test_job_json_says_what_the_job_is(out: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    inputs = identify_inputs([tmp_path / "in.jsonl"])
    job = JobDescription(JOB.parts, inputs, {"window": 4})
    JobFolder(out, job).close()
    assert read_description(tmp_path / "out.jsonl.job") == job
    content = json.loads((tmp_path / "out.jsonl.job/job.json").read_text())
    assert content["fingerprint"] == job.fingerprint
    assert content["inputs"][0]["size"] == 3


def test_second_runner_is_refused_by_process_and_host(out: Path) -> None:
    with JobFolder(out, JOB):
        message = f"process {HERE.pid} on {HERE.host} holds its lock"
        for restart in (False, True):
            with pytest.raises(JobInUseError, match=message):
                JobFolder(out, JOB, restart=restart)
        other = (
            "import sys; from pathlib import Path\n"
            "from idefics2_engine.jobs.store.job_lock import JobLock\n"
            "JobLock(Path(sys.argv[1]))"
        )
        command = [sys.executable, "-c", other, str(out.with_name("out.jsonl.job"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"JobInUseError: {out}.job: the job is running: {message}" in done.stderr
    assert names(out) == ["out.jsonl.job"]
    JobFolder(out, JOB).close()


def test_holder_is_known_without_the_lock(tmp_path: Path) -> None:
    assert read_holder(tmp_path) is None
    lock = JobLock(tmp_path)
    assert read_holder(tmp_path) == HERE
    lock.release()
    lock.release()
    assert read_holder(tmp_path) is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for holder, known in (
        (Holder(ended.pid, HERE.host), None),
        (Holder(ended.pid, "elsewhere"), Holder(ended.pid, "elsewhere")),
    ):
        (tmp_path / "lock").write_text(json.dumps(holder._asdict()))
        assert read_holder(tmp_path) == known
    # A long name is replaced as a whole
    (tmp_path / "lock").write_text("x" * 999)
    with_rest = JobLock(tmp_path)
    assert read_holder(tmp_path) == HERE
    with_rest.release()


def test_lock_of_a_moved_folder_is_not_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is moved aside after the file is opened and before it is locked."""
    import fcntl

    folder, flock = tmp_path / "job", fcntl.flock
    folder.mkdir()

    def move_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        folder.rename(tmp_path / "job.1")
        folder.mkdir()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", move_first)
    lock = JobLock(folder)
    with pytest.raises(JobInUseError):
        JobLock(folder)
    JobLock(tmp_path / "job.1").release()
    lock.release()


def test_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(JobError, match="lock: cannot be locked: No locks available"):
        JobLock(tmp_path)


def test_other_fingerprint_is_refused_with_a_table(out: Path) -> None:
    run_job(out, ROWS, parts={"seed": 0, "dtype": "bf16"})
    before = out.with_name("out.jsonl.job").joinpath("job.json").read_bytes()
    with pytest.raises(FingerprintError) as raised:
        run_job(out, ROWS, parts={"seed": 1, "dtype": "bf16"})
    assert str(raised.value).endswith("\nname  journal  now\nseed  0        1")
    assert out.with_name("out.jsonl.job").joinpath("job.json").read_bytes() == before
    assert run_job(out, ROWS, parts={"seed": 1, "dtype": "bf16"}, force_resume=True) == []
    # It is the job's fingerprint now, and the earlier one is kept
    assert run_job(out, ROWS, parts={"seed": 1, "dtype": "bf16"}) == []
    accepted = read_description(out.with_name("out.jsonl.job")).accepted
    assert accepted == ({"seed": 0, "dtype": "bf16"},)


def test_restart_moves_the_old_job_aside(out: Path) -> None:
    run_job(out, ROWS, parts={"seed": 0})
    old = (out.with_name("out.jsonl.job") / "journal-00000.jsonl").read_bytes()
    (out.with_name("out.jsonl.job.1")).write_text("the user's")
    computed = run_job(out, ROWS, parts={"seed": 1}, restart=True)
    assert sorted(computed) == list(range(6))
    assert names(out) == [
        "out.jsonl",
        "out.jsonl.1",
        "out.jsonl.job",
        "out.jsonl.job.1",
        "out.jsonl.job.2",
    ]
    assert out.with_name("out.jsonl.1").read_bytes() == expected(ROWS)
    assert (out.with_name("out.jsonl.job.2") / "journal-00000.jsonl").read_bytes() == old
    # There is nothing to move where no job was begun
    other = out.with_name("other.jsonl")
    run_job(other, ROWS, restart=True)
    assert not other.with_name("other.jsonl.job.1").exists()


def test_file_at_the_output_is_refused_or_moved_aside(out: Path) -> None:
    out.write_text("the user's")
    for restart in (False, True):
        with pytest.raises(JobError, match=r"out\.jsonl: must not exist.*--overwrite"):
            run_job(out, ROWS, restart=restart)
    assert out.read_text() == "the user's"
    run_job(out, ROWS, overwrite=True)
    assert out.with_name("out.jsonl.1").read_text() == "the user's"
    # The job's own output that was edited is the user's as well
    out.write_bytes(edited := out.read_bytes().replace(b"0.1", b"0.2"))
    for restart in (False, True):
        with pytest.raises(JobError, match="must not exist"):
            run_job(out, ROWS, restart=restart)
    assert run_job(out, ROWS, overwrite=True) == []
    assert out.with_name("out.jsonl.2").read_bytes() == edited
    assert out.read_bytes() == expected(ROWS)


def test_link_at_the_output_is_the_users(out: Path) -> None:
    target = out.with_name("target")
    target.write_text("the user's")
    out.symlink_to(target)
    with pytest.raises(JobError, match="must not exist"):
        run_job(out, ROWS)
    out.unlink()
    out.with_name("out.jsonl.partial").symlink_to(target)
    run_job(out, ROWS)
    assert target.read_text() == "the user's"
    assert not out.is_symlink()
    # The name is the job's by now, but not what is behind the link
    out.with_name("out.jsonl.partial").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        run_job(out, ROWS)
    assert target.read_text() == "the user's"


def test_partial_output_of_nobody_is_moved_aside(out: Path) -> None:
    out.with_name("out.jsonl.partial").write_text("the user's")
    run_job(out, ROWS)
    assert out.with_name("out.jsonl.partial.1").read_text() == "the user's"


def test_output_that_appears_during_the_job_is_kept(out: Path) -> None:
    with JobFolder(out, JOB) as folder:
        folder.partial.write_bytes(b"whole")
        out.write_text("the user's")
        with pytest.raises(JobError, match="made while the job ran"):
            folder.publish(WrittenOutput(1, 5, "x"))
        assert out.read_text() == "the user's"
        assert folder.partial.read_bytes() == b"whole"


def test_rows_that_were_appended_extend_the_output(out: Path) -> None:
    run_job(out, ROWS[:4])
    assert sorted(run_job(out, ROWS)) == [4, 5]
    assert out.read_bytes() == expected(ROWS)
    assert [one.rows for one in read_outputs(out.with_name("out.jsonl.job"))] == [4, 6]


def test_earlier_output_is_known_and_not_the_finished_one(out: Path) -> None:
    run_job(out, ROWS[:4])
    with JobFolder(out, JobDescription({})) as folder:
        # The process dies before the rename
        add_output(FileOperations(), folder.path, WrittenOutput(6, 999, "of more rows"))
    with JobFolder(out, JobDescription({})) as folder:
        assert folder.finished is None
    assert read_status(out).finished is None
    run_job(out, ROWS)
    assert out.read_bytes() == expected(ROWS)
    assert read_status(out).finished == read_outputs(folder.path)[-1]


def test_row_that_changed_is_computed_again(out: Path) -> None:
    run_job(out, ROWS)
    changed = [*ROWS[:2], "another", *ROWS[3:]]
    assert run_job(out, changed) == [2]
    assert out.read_bytes() == expected(changed)
    # The first record of the row is good again
    assert run_job(out, ROWS) == []
    assert out.read_bytes() == expected(ROWS)


def test_folder_that_is_none_of_a_job_is_refused(out: Path) -> None:
    folder = out.with_name("out.jsonl.job")
    folder.mkdir()
    (folder / "letters.txt").write_text("the user's")
    with pytest.raises(JobError, match=r"job\.json"):
        run_job(out, ROWS)
    run_job(out, ROWS, restart=True)
    assert (out.with_name("out.jsonl.job.1") / "letters.txt").read_text() == "the user's"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"v":2}', b'{"v":1}', b'{"v":1,"parts":{},"inputs":[1],"options":{},'
     b'"accepted":[],"fingerprint":""}', b'{"v":1,"parts":{"seed":1},"inputs":[],"options":{},'
     b'"accepted":[],"fingerprint":"x"}'],
)  # fmt: skip
def test_damaged_description_is_refused(content: bytes, out: Path) -> None:
    run_job(out, ROWS)
    path = out.with_name("out.jsonl.job") / "job.json"
    path.write_bytes(content)
    with pytest.raises(JobError, match=r"job\.json"):
        run_job(out, ROWS)
    assert path.read_bytes() == content


def test_damaged_list_of_outputs_is_refused_and_can_be_left(out: Path) -> None:
    run_job(out, ROWS)
    out.with_name("out.jsonl.job").joinpath("outputs.json").write_bytes(b"{")
    with pytest.raises(JobError, match=r"outputs\.json"):
        run_job(out, ROWS)
    with pytest.raises(JobError, match="must not exist"):
        run_job(out, ROWS, restart=True)
    assert len(run_job(out, ROWS, restart=True, overwrite=True)) == 6
    assert out.with_name("out.jsonl.1").read_bytes() == expected(ROWS)


def test_missing_folder_of_the_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="must be in an existing folder"):
        JobFolder(tmp_path / "nowhere" / "out.jsonl", JOB)


def test_description_without_json_makes_nothing(out: Path) -> None:
    with pytest.raises(ValueError, match="must be a string"):
        JobFolder(out, JobDescription({"part": {1: 2}}))
    assert names(out) == []


def test_status_of_a_running_job(out: Path) -> None:
    with pytest.raises(JobError, match=r"there is no job for .*: no folder .*out\.jsonl\.job"):
        read_status(out)
    run_job(out, ROWS[:4])
    with JobFolder(out, JobDescription({})) as folder:
        with (folder.path / "journal-00000.jsonl").open("ab") as file:
            file.write(b"damaged\nunfinished")
        before = {path: path.read_bytes() for path in folder.path.iterdir()}
        status = read_status(out)
        assert (status.rows, status.damaged, status.holder) == (4, 1, HERE)
        assert status.finished == folder.finished != None  # noqa: E711
        assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
    out.unlink()
    status = read_status(out)
    assert status.holder is None
    assert status.finished is None


def test_input_changes_are_known_on_resume(out: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("grown", "same", "changed", "gone", "touched", "new")]
    for path in files[:-1]:
        path.write_text("1\n")
    JobFolder(out, JobDescription({}, identify_inputs(files[:-1]))).close()
    files[0].write_text("1\n2\n")
    files[2].write_text("")
    os.utime(files[4], ns=(1, 1))
    files[5].write_text("")
    kept = [path for path in files if path != files[3]]
    job = JobDescription({}, identify_inputs(kept))
    with JobFolder(out, job) as folder:
        kinds = ("grown", "changed", "changed", "added", "removed")
        changed = (files[0], files[2], files[4], files[5], files[3])
        assert folder.input_changes == [
            InputChange(str(path), kind) for path, kind in zip(changed, kinds, strict=True)
        ]
    with JobFolder(out, job) as folder:
        assert folder.input_changes == []
    assert changed_inputs(job.inputs, job.inputs) == []


def test_output_is_apart_from_the_input(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    file = source / "a.jsonl"
    file.write_text("{}")
    hard = tmp_path / "hard.jsonl"
    hard.hardlink_to(file)
    link = tmp_path / "link"
    link.symlink_to(source)
    for out, inputs in (
        (file, [file]),
        (hard, [file]),
        (link / "a.jsonl", [file]),
        (source / "new.jsonl", [source]),
        (source / "deep" / "new.jsonl", [source]),
        (link / "new.jsonl", [source]),
        (source / "new.jsonl", [link]),
    ):
        with pytest.raises(JobError, match="must be apart from the input"):
            check_apart(out, inputs)
    check_apart(tmp_path / "new.jsonl", [file, source, link])
    check_apart(source / "new.jsonl", [file])
