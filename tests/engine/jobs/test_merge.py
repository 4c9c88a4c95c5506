"""Merged shards have the bytes of the run without shards, and nothing is lost or destroyed."""

import os
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.cli import main
from idefics2_engine.jobs.job_errors import FingerprintError, JobError, JobInUseError
from idefics2_engine.jobs.merge import merge_shards, whole_fingerprint, whole_parts
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.store.fingerprint import fingerprint
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import JobFolder
from idefics2_engine.jobs.store.journal import Journal
from idefics2_engine.jobs.writers.output_file import MakeFormat, OutputFile
from job_files import FailingFiles
from shard_jobs import ROWS, key_of, run_shard, run_shards


class ReversedFormat:
    """A format whose rows cannot be taken from the output."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file

    def write_row(self, row: bytes) -> None:
        self._file.write(row[::-1])

    def finish(self) -> None:
        self._file.write(b"end")


def job_parts(index: int, count: int) -> dict[str, Any]:
    return {"seed": 3, "input": {"limit": None, "shard": [index, count]}}


@pytest.mark.parametrize("rows", [ROWS, 2, 0])
@pytest.mark.parametrize("count", [2, 3])
def test_merged_shards_have_the_bytes_of_one_run(tmp_path: Path, rows: int, count: int) -> None:
    whole = run_shard(tmp_path / "whole.jsonl", rows=rows)
    shards = run_shards(tmp_path, count, rows=rows)
    merged = tmp_path / "merged.jsonl"
    assert merge_shards(shards[::-1], merged).rows == rows
    assert merged.read_bytes() == whole.read_bytes()
    assert not merged.with_name("merged.jsonl.partial").exists()


def test_rows_of_other_formats_are_in_the_journal(tmp_path: Path) -> None:
    options: dict[str, Any] = {"make_format": ReversedFormat}
    whole = run_shard(tmp_path / "whole.reversed", **options)
    shards = run_shards(tmp_path, 3, "out.reversed", **options)
    asked = []

    def format_of(out: Path, job: JobDescription) -> MakeFormat:
        asked.append((out.name, job.fingerprint))
        return ReversedFormat

    merge_shards(shards, tmp_path / "merged.reversed", format_of=format_of)
    assert (tmp_path / "merged.reversed").read_bytes() == whole.read_bytes()
    # The format is that of the job without shards
    assert asked == [("merged.reversed", fingerprint(job_parts(0, 1)))]


def test_lines_of_another_format_are_not_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": {"format": "openai"}, "make_format": ReversedFormat}
    whole = run_shard(tmp_path / "whole.jsonl", **options)
    shards = run_shards(tmp_path, 2, **options)
    merge_shards(shards, tmp_path / "merged.jsonl", format_of=lambda *_: ReversedFormat)
    assert (tmp_path / "merged.jsonl").read_bytes() == whole.read_bytes()


def test_newest_answer_counts_and_versions_of_a_row_are_refused(tmp_path: Path) -> None:
    """A row that is computed again has the same key, and one whose input changed another."""
    options: dict[str, Any] = {"make_format": ReversedFormat}
    shards = run_shards(tmp_path, 2, "out.reversed", **options)
    with Journal(shards[1].with_name("1-out.reversed.job")) as journal:
        row = encode_row({"id": "é3", "row": 3, "text": "again"})
        journal.append(1, key_of(3, ""), row)
    merged = tmp_path / "merged.jsonl"
    merge_shards(shards, merged)
    assert merged.read_bytes().splitlines()[3] == row
    with Journal(shards[1].with_name("1-out.reversed.job")) as journal:
        journal.append(1, key_of(3, "changed"), row)
    with pytest.raises(JobError, match="row 1 must have one version, got answers to several"):
        merge_shards(shards, tmp_path / "other.jsonl")
    # Lines of an output say which version counts
    lines = run_shards(tmp_path, 2, text="old")
    lines = run_shards(tmp_path, 2, text="new")
    merge_shards(lines, tmp_path / "lines.jsonl")
    whole = run_shard(tmp_path / "whole.jsonl", text="new")
    assert (tmp_path / "lines.jsonl").read_bytes() == whole.read_bytes()


def test_damaged_journal_is_refused(tmp_path: Path) -> None:
    shards = run_shards(tmp_path, 2, "out.reversed", make_format=ReversedFormat)
    for path in shards[0].with_name("0-out.reversed.job").glob("journal-*"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"row":4', b'"row":5', 1))
    with pytest.raises(JobError, match="row 2 must be there, got none"):
        merge_shards(shards, tmp_path / "merged.jsonl")
    assert not (tmp_path / "merged.jsonl").exists()


def test_gaps_and_overlaps_are_refused(tmp_path: Path) -> None:
    shards = run_shards(tmp_path, 4)
    copy = run_shard(tmp_path / "copy.jsonl", 2, 4)
    merged = tmp_path / "merged.jsonl"
    for named, message in (
        ([], "the outputs of all shards must be named, got none"),
        (shards[:3], "all 4 shards must be named, got no 3/4"),
        (shards[1:2], "all 4 shards must be named, got no 0/4, 2/4, 3/4"),
        ([*shards, copy], "shard 2/4 must be named once, got .*2-out.jsonl and .*copy.jsonl"),
        ([*shards, shards[0]], "shard 0/4 must be named once"),
        ([run_shard(tmp_path / "whole.jsonl")], r"of a shard \(--shard\), got the shard \[0, 1\]"),
        ([*shards[:3], run_shard(tmp_path / "x.jsonl", 3, 5)], "one of 4 shards .* one of 5"),
    ):
        with pytest.raises(JobError, match=message):
            merge_shards(named, merged)
    assert not merged.exists()
    assert not merged.with_name("merged.jsonl.job").exists()


def test_shards_of_other_rows_are_refused(tmp_path: Path) -> None:
    shards = run_shards(tmp_path, 2)
    short = run_shard(tmp_path / "short.jsonl", 1, 2, rows=ROWS - 6)
    with pytest.raises(JobError, match="shard 0/2 of 20 rows must have 10 rows, got 12"):
        merge_shards([shards[0], short], tmp_path / "merged.jsonl")
    # As many rows, but not those between the rows of the other shard
    other = run_shard(tmp_path / "other.jsonl", 1, 2, numbers=range(2, 13))
    with pytest.raises(JobError, match="the row after 2 must have a larger number, got 2"):
        merge_shards([shards[0], other], tmp_path / "merged.jsonl")
    assert not (tmp_path / "merged.jsonl").exists()


def test_other_jobs_are_refused_with_what_differs(tmp_path: Path) -> None:
    first = run_shard(tmp_path / "0.jsonl", 0, 2)
    second = run_shard(tmp_path / "1.jsonl", 1, 2, seed=4)
    with pytest.raises(FingerprintError) as raised:
        merge_shards([first, second], tmp_path / "merged.jsonl")
    assert str(raised.value).splitlines()[1:] == ["name  shard 0/2  shard 1/2", "seed  3        4"]
    for name, rows in (("a.jsonl", 3), ("b.jsonl", 4)):
        (tmp_path / name).write_text("x" * rows)
    shards = [
        run_shard(tmp_path / f"{index}-in.jsonl", index, 2, inputs=(tmp_path / name,))
        for index, name in enumerate(("a.jsonl", "b.jsonl"))
    ]
    with pytest.raises(JobError, match="got files of other names or sizes"):
        merge_shards(shards, tmp_path / "merged.jsonl")


def test_unfinished_shards_are_refused(tmp_path: Path) -> None:
    first = run_shard(tmp_path / "0.jsonl", 0, 2)
    second = run_shard(tmp_path / "1.jsonl", 1, 2, finish=False)
    merged = tmp_path / "merged.jsonl"
    with pytest.raises(JobError, match=r"1.jsonl: shard 1/2 must be finished"):
        merge_shards([first, second], merged)
    run_shard(second, 1, 2)
    with (
        JobFolder(second, JobDescription(job_parts(1, 2))),
        pytest.raises(JobInUseError, match=f"got it running in process {os.getpid()}"),
    ):
        merge_shards([first, second], merged)
    second.write_bytes(second.read_bytes() + b"{}\n")
    with pytest.raises(JobError, match="its output as it was written"):
        merge_shards([first, second], merged)
    (tmp_path / "file.jsonl").write_text("{}\n")
    with pytest.raises(JobError, match=r"must be the output of a job, got no .*file.jsonl.job"):
        merge_shards([first, tmp_path / "file.jsonl"], merged)


def test_nothing_is_destroyed(tmp_path: Path) -> None:
    shards = run_shards(tmp_path, 2)
    with pytest.raises(JobError, match="output must be apart from the input"):
        merge_shards(shards, shards[0], overwrite=True)
    merged = tmp_path / "merged.jsonl"
    merged.write_text("mine")
    with pytest.raises(JobError, match="--overwrite moves it aside"):
        merge_shards(shards, merged)
    assert merged.read_text() == "mine"
    merge_shards(shards, merged, overwrite=True)
    assert (tmp_path / "merged.jsonl.1").read_text() == "mine"
    # Its own output is made again
    before = merged.read_bytes()
    merge_shards(shards, merged)
    assert merged.read_bytes() == before
    assert not (tmp_path / "merged.jsonl.2").exists()
    other = run_shard(tmp_path / "other.jsonl", seed=9)
    content = other.read_bytes()
    with pytest.raises(JobError, match="got one of another job; --overwrite moves it aside"):
        merge_shards(shards, other)
    merge_shards(shards, other, overwrite=True)
    assert (tmp_path / "other.jsonl.1").read_bytes() == content
    assert (tmp_path / "other.jsonl.job.1").is_dir()
    assert other.read_bytes() == before


def test_run_without_shards_knows_the_merged_output(tmp_path: Path) -> None:
    shards = run_shards(tmp_path, 2)
    merged = tmp_path / "merged.jsonl"
    output = merge_shards(shards, merged)
    with JobFolder(merged, JobDescription(job_parts(0, 1))) as folder:
        assert folder.finished == output
    parts = job_parts(1, 2)
    assert whole_parts(parts) == job_parts(0, 1)
    assert whole_fingerprint(parts) == fingerprint(job_parts(0, 1))
    assert whole_fingerprint({"seed": 3}) == whole_fingerprint(
        {"seed": 3, "input": {"shard": [2, 4]}}
    )


def test_merge_that_failed_can_be_done_again(tmp_path: Path) -> None:
    shards = run_shards(tmp_path, 2)
    merged = tmp_path / "merged.jsonl"
    at = 0
    while not merged.exists():
        files = FailingFiles(28, range(at, 999))
        try:
            merge_shards(shards, merged, files=files)
        except OSError:
            at += 1
    assert at > 5
    whole = run_shard(tmp_path / "whole.jsonl")
    assert merged.read_bytes() == whole.read_bytes()


def test_command_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = [str(path) for path in run_shards(tmp_path, 2)]
    merged = str(tmp_path / "merged.jsonl")
    assert main.main(["merge", *shards, "-o", merged]) == 0
    assert capsys.readouterr().out == f"{merged}: {ROWS} rows of 2 shards\n"
    assert main.main(["merge", shards[0], "-o", merged]) == 2
    assert "all 2 shards must be named, got no 1/2" in capsys.readouterr().err
    assert main.main(["merge", *shards, "-o", str(tmp_path / "no/merged.jsonl")]) == 2
