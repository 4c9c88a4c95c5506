"""The command where standard output is closed, a folder is read-only or the disk is full."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from idefics2_engine.cli.main import main
from paths import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'kernels'}"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write rows that need no model, because all of them are bad."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {n}"}) + "\n" for n in range(40)))
    return path


def command(source: Path, out: Path) -> list[str]:
    given = ["run", "-i", str(source), "-o", str(out), "--device", "cpu"]
    return [sys.executable, "-m", "idefics2_engine", *given]


@pytest.mark.parametrize(
    "redirection",
    [
        ">&- 2>&-",
        "| true",
        pytest.param(">&-", marks=pytest.mark.long),
        pytest.param("2>&-", marks=pytest.mark.long),
    ],
)
def test_closed_streams_cost_nothing(source: Path, tmp_path: Path, redirection: str) -> None:
    out = tmp_path / "out.jsonl"
    shell = f'set -o pipefail; "$@" {redirection}'
    ended = subprocess.run(
        ["bash", "-c", shell, "bash", *command(source, out)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    assert "Traceback" not in ended.stderr
    assert out.read_bytes().count(b"\n") == 40
    assert (tmp_path / "out.jsonl.summary.json").exists()


def test_full_disk_is_one_line_and_resumable(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ended = subprocess.run(
        command(source, out),
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    said = [line for line in ended.stderr.splitlines() if os.strerror(errno.EFBIG) in line]
    assert len(said) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    assert main(command(source, out)[3:]) == 3
    assert out.read_bytes().count(b"\n") == 40


def test_folder_that_takes_no_files(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also root can make no file in it."""
    assert main(command(source, Path("/proc/self/out.jsonl"))[3:]) == 5
    said = capsys.readouterr().err
    assert "/proc/self/out.jsonl.job: cannot be written: " in said
    assert "Traceback" not in said
