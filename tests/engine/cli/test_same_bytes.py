"""The command's output has the same bytes, however many rows are computed at once or in one run."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_folder import job_path
from paths import ROOT
from stand_in_job import num_lines

SOME = ("--save", "token_ids,prompt")
# Log probabilities do not depend on other rows with products that are row by row
ALL = ("--save", "token_ids,logprobs", "--logprobs", "2", "--deterministic")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    questions = (ROOT / "examples/jobs/questions.jsonl").read_text()
    rows = [json.loads(line) for line in questions.splitlines()]
    rows[3]["sampling"] = {"seed": 5, "n": 2}
    rows[5]["images"] = ["missing.png"]
    rows[7] = {"id": "no prompt"}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    return path


def run(source: Path, name: str, *options: str) -> int:
    out = source.with_name(name)
    files = ["-i", str(source), "-o", str(out), "--media-root", str(DEMO_IMAGES)]
    sampling = ["--device", "cpu", "--no-split", "--max-tokens", "4", "--temperature", "0.7"]
    return main(["run", *files, *sampling, *options])


def interrupted(monkeypatch: pytest.MonkeyPatch, run: Callable[[], int], at: int) -> int:
    """Call ``run``, and send it SIGINT before the journal's record number ``at``."""
    write, records = FileOperations.write, []

    def signalled(files: FileOperations, fd: int, data: memoryview) -> int:
        if bytes(data[:6]) == b'{"v":1':
            records.append(1)
            if len(records) == at:
                os.kill(os.getpid(), signal.SIGINT)
        return write(files, fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(FileOperations, "write", signalled)
        return run()


@pytest.mark.parametrize("saved", [SOME, pytest.param(ALL, marks=pytest.mark.long)])
def test_rows_at_once_and_interrupts_change_no_byte(
    source: Path, saved: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(source, "whole.jsonl", *saved) == 3
    whole = source.with_name("whole.jsonl").read_bytes()
    assert whole.count(b"\n") == 10
    for name, sizes in {
        "one by one": ("--max-num-seqs", "1", "--in-flight", "1", "--window", "1"),
        "chunks": ("--max-num-seqs", "3", "--in-flight", "5", "--max-num-batched-tokens", "64"),
        "no room": ("--max-prepared-bytes", "1", "--kv-cache-tokens", "640", "--max-model-len", "512"),
    }.items():  # fmt: skip
        assert run(source, f"{name}.jsonl", *saved, *sizes) == 3
        assert source.with_name(f"{name}.jsonl").read_bytes() == whole, name
    out = source.with_name("parts.jsonl")
    few = ("--max-num-seqs", "2", "--in-flight", "2")
    codes = []
    # Every start finishes three rows at least
    for _ in range(4):
        codes.append(interrupted(monkeypatch, lambda: run(source, out.name, *saved, *few), 3))
        if codes[-1] != 130:
            break
    assert codes[-1] == 3
    assert len(codes) > 1
    assert out.read_bytes() == whole
    assert num_lines(job_path(out)) == 10


@pytest.mark.long
def test_workers_change_no_bit_of_log_probabilities(source: Path) -> None:
    assert run(source, "one.jsonl", *ALL) == 3
    assert run(source, "two.jsonl", *ALL, "--workers", "2", "--in-flight", "3") == 3
    one, two = (source.with_name(name).read_bytes() for name in ("one.jsonl", "two.jsonl"))
    assert two == one
    assert b'"logprobs":[{' in one
