"""Runs that are killed at any write, of the stand-in and of the demo checkpoint; their memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.jobs.store.job_folder import job_path
from paths import ROOT
from stand_in_job import num_lines

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'tests/helpers'}"}


def stand_in(*arguments: object) -> dict[str, Any]:
    """Run the stand-in's program, and return what it prints."""
    program = ROOT / "tests/helpers/run_program.py"
    command = [sys.executable, str(program), *map(str, arguments)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    printed: dict[str, Any] = json.loads(ended.stdout)
    assert printed.pop("torch") is False
    return printed


@pytest.mark.parametrize(
    ("kills", "rows"), [(30, 300), pytest.param(100, 2000, marks=pytest.mark.long)]
)
def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path, kills: int, rows: int) -> None:
    printed = stand_in("kill", tmp_path, kills, rows)
    assert printed["dead"] == kills
    assert printed["jobs"] >= 1


@pytest.mark.parametrize("rows", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_memory_does_not_grow_with_rows(tmp_path: Path, rows: int) -> None:
    """The first row is answered last, so every other one waits for it."""
    printed = stand_in("memory", tmp_path, rows)
    assert printed["rows"] == rows
    assert printed["grown"] < 50 << 20


KILLING = """
import os, signal, sys
from idefics2_engine.cli.main import main
from idefics2_engine.jobs.store.file_operations import FileOperations

at, share = int(sys.argv[1]), float(sys.argv[2])
write, calls = FileOperations.write, []

def killing(files, fd, data):
    calls.append(1)
    if len(calls) == at:
        os.write(fd, data[: int(len(data) * share)])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(files, fd, data)

FileOperations.write = killing
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.long
def test_killed_job_of_the_demo_checkpoint(tmp_path: Path) -> None:
    questions = (ROOT / "examples/jobs/questions.jsonl").read_text().splitlines()
    rows = []
    for number in range(120):
        row = json.loads(questions[number % 12]) | {"id": number}
        if number % 2:
            row["sampling"] = {"seed": number}
        if number % 20 == 7:
            row["images"] = ["missing.png"]
        rows.append(json.dumps(row))
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(rows))

    def run(out: Path, at: int, share: float = 0.0) -> int:
        command = ["run", "-i", str(source), "-o", str(out), "--media-root", str(DEMO_IMAGES)]
        options = ["--temperature", "0.7", "--device", "cpu", "--max-num-seqs", "8"]
        program = [sys.executable, "-c", KILLING, str(at), str(share), *command, *options]
        return subprocess.run(program, capture_output=True).returncode

    assert run(tmp_path / "whole.jsonl", 0) == 3
    out = tmp_path / "killed.jsonl"
    rng = random.Random(0)
    for _ in range(3):
        assert run(out, rng.randrange(4, 20), rng.random()) == -9
    assert run(out, 0) == 3
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert num_lines(job_path(out)) == 120
