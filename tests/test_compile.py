"""Every kernel compiles, and fits, on the GPUs it is meant for; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may use


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_model_shapes_compile_and_fit(arch: int) -> None:
    # a process of its own: whether Triton interprets is settled when a kernel is imported
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # the oldest version that is supported lies in an environment of its own
    python = os.environ.get("COMPILE_PYTHON", sys.executable)
    script = Path(__file__).with_name("compile_catalog.py")
    done = subprocess.run(
        [python, str(script), str(arch)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY[arch], report
        assert report["spills"] == 0, report
