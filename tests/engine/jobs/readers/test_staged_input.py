"""Standard input in the job's folder: written whole, found again, and never replaced by other rows."""

import gzip
import io
import os
import sys
from pathlib import Path

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.staged_input import stage_stdin, with_staged_input
from idefics2_engine.jobs.store.input_files import is_staged
from job_inputs import DEFAULTS, images_of, input_options

ROWS = b'{"prompt": "a", "images": ["x.png"]}\n{"prompt": "b"}\n'


def stage(folder: Path, content: bytes, kind: str = "auto") -> Path:
    return stage_stdin(folder, kind, io.BytesIO(content))


def test_a_job_finds_its_input_again(tmp_path: Path) -> None:
    path = stage(tmp_path, ROWS)
    assert (path, path.read_bytes()) == (tmp_path / "stdin.jsonl", ROWS)
    os.utime(path, (1, 1))
    assert stage(tmp_path, ROWS) == path
    assert stage(tmp_path, b"") == path
    # The job's input has not changed
    assert path.stat().st_mtime == 1
    assert path.read_bytes() == ROWS
    assert stage(tmp_path, ROWS + b"more\n") == path
    assert path.read_bytes() == ROWS + b"more\n"
    assert [is_staged(one.name) for one in tmp_path.iterdir()] == [True]
    assert not is_staged("journal-00000.jsonl")


@pytest.mark.parametrize("other", [b"x", ROWS[:-1], ROWS.replace(b"b", b"c")])
def test_other_input_is_refused_and_changes_nothing(tmp_path: Path, other: bytes) -> None:
    path = stage(tmp_path, ROWS)
    with pytest.raises(ConfigError, match="standard input must begin like"):
        stage(tmp_path, other)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [ROWS]
    assert path.read_bytes() == ROWS


def test_nothing_to_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="standard input must have rows, got nothing"):
        stage(tmp_path, b"")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="standard input must have rows, got nothing"):
        stage_stdin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "stdin.part").write_bytes(ROWS * 3)
    assert stage(tmp_path, ROWS).read_bytes() == ROWS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "kind", "name"),
    [
        (gzip.compress(ROWS, mtime=0), "auto", "stdin.jsonl.gz"),
        (b"\x28\xb5\x2f\xfd rest", "openai", "stdin.jsonl.zst"),
        (b"PAR1 rest", "auto", "stdin.parquet"),
        (b"a,b\n", "csv", "stdin.csv"),
        (gzip.compress(b"a,b\n", mtime=0), "csv", "stdin.csv.gz"),
        (b"tar", "webdataset", "stdin.tar"),
    ],
)
def test_the_name_shows_the_format(tmp_path: Path, content: bytes, kind: str, name: str) -> None:
    assert stage(tmp_path, content, kind).name == name


def test_images_are_below_the_folder_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "OUT.job").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ROWS)))
    options = with_staged_input(input_options("-"), Path("OUT.job"))
    rows = list(JobInput(options, DEFAULTS).rows())
    assert images_of(rows[0]) == [f"{tmp_path}/x.png"]
    assert rows[1].place == "OUT.job/stdin.jsonl: line 2"
    plain = input_options("q.jsonl")
    assert with_staged_input(plain, Path("OUT.job")) is plain
    with pytest.raises(ConfigError, match="images must be files, got standard input"):
        with_staged_input(input_options("-", input_format="images"), Path("OUT.job"))
