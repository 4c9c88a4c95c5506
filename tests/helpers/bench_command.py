"""Runs of ``idefics2 bench`` on a CPU, for tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_bench import latency_peers
from idefics2_engine.cli.main import main

CPU = ["--device", "cpu", "--ops", "reference", "--commit", "abc"]


def bench(out: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a suite; return its description of the machine and its rows."""
    assert main(["bench", *arguments, *CPU, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    return written["machine"], written["rows"]


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    """Let the compiled peer use another backend of ``torch.compile``."""
    for options in ("COMPILE_STEP", "COMPILE_IMAGES"):
        monkeypatch.setattr(latency_peers, options, {"backend": backend})
