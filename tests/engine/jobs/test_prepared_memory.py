"""Memory of prepared images is bounded by ``max_prepared_bytes``, not by the number of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT
from prepared_rows import SIDE

ENVIRONMENT = os.environ | {
    "PYTHONPATH": ":".join(str(ROOT / name) for name in ("engine", "kernels", "tests/helpers")),
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.long
def test_large_images_stay_within_their_bound(tmp_path: Path) -> None:
    """All 700 images would take 2 GB."""
    rows, bound = 700, 256 << 20
    program = str(ROOT / "tests/helpers/prepared_rows.py")
    command = [sys.executable, program, str(tmp_path / "out.jsonl"), str(rows), str(bound)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["rows"] == rows
    # Two rows a thread are being prepared when the bound is reached
    assert printed["kept"] <= bound + 5 * 3 * SIDE**2
    assert printed["grown"] < bound + 300 * 10**6
