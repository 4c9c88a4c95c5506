"""How long ``idefics2 run`` takes from its start to the first journalled row."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from idefics2_bench.jobs.apart import start_apart
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.jobs.store.journal import segment_path

Figures = dict[str, Any]

_ROWS = 12
_QUESTION = "What is in the picture?"
_POLL_SECONDS = 0.002
_MOST_SECONDS = 300.0


def first_row(folder: Path, rounds: int, count: int = _ROWS) -> Figures:
    """Run the demo job in new processes and watch its journal; the first run only warms caches.

    Returns:
        The row of the run with the median time.
    """
    folder.mkdir()
    images = sorted(path.name for path in DEMO_IMAGES.iterdir() if path.suffix == ".png")
    lines = [
        json.dumps({"id": number, "images": [images[number % len(images)]], "prompt": _QUESTION})
        for number in range(count)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _once(folder, 0)
    runs = sorted((_once(folder, turn) for turn in range(1, rounds + 1)), key=lambda one: one["ms"])
    median = runs[(rounds - 1) // 2]
    names = {"impl": "reference", "model": "demo", "dtype": "float32"}
    return {**names, "rows": count, **median, "rounds_ms": [one["ms"] for one in runs]}


def _once(folder: Path, turn: int) -> dict[str, float]:
    out = folder / f"out-{turn}.jsonl"
    arguments = ["run", "-i", str(folder / "rows.jsonl"), "-o", str(out), "--device", "cpu"]
    arguments += ["--media-root", str(DEMO_IMAGES)]
    journal = segment_path(job_path(out), 0)
    begin = time.perf_counter()
    process = start_apart(
        "idefics2_engine", arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seconds = None
    try:
        # A record is written at once, so a file that is not empty has one
        while process.poll() is None and seconds is None:
            if journal.exists() and journal.stat().st_size:
                seconds = time.perf_counter() - begin
                break
            if time.perf_counter() - begin > _MOST_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
        cpu = _cpu_seconds(process.pid)
        if seconds is None or process.wait(_MOST_SECONDS):
            raise Idefics2Error(f"the demo job must answer its rows, got {process.poll()}")
    finally:
        process.kill()
        process.wait()
    return {"ms": 1e3 * seconds, "cpu_seconds": cpu}


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far; 0 where the system has no ``/proc``."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    # The name of the program, in parentheses, may have spaces
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
