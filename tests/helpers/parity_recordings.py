"""Recordings of the demo model, for tests of the comparison of paths."""

from pathlib import Path
from typing import Any

from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from idefics2_engine.parity import Case, Comparison, compare
from idefics2_engine.parity import Path as ParityPath
from idefics2_engine.parity.recording.dump import Recording
from idefics2_engine.parity.recording.record import record

CASES = (
    Case.question("Where is the star?", [DEMO_IMAGES / "shapes.png"]),
    Case.raw("a"),
)
TOKENS = 3


def record_path(path: str, folder: Path, model: Path = DEMO_MODEL, **settings: Any) -> Recording:
    """Record a path on ``CASES`` on the CPU."""
    settings = {"cases": CASES, "device": "cpu", "max_tokens": TOKENS, **settings}
    return record(ParityPath.parse(path), folder, model_folder=model, **settings)


def compare_on_cpu(a: str | Path, b: str | Path, **settings: Any) -> Comparison:
    """Compare two paths or recordings on ``CASES`` on the CPU."""
    settings = {"cases": CASES, "device": "cpu", "max_tokens": TOKENS, **settings}
    return compare(str(a), str(b), **settings)


def first_stage(comparison: Comparison) -> str | None:
    """Return the first stage whose difference is beyond rounding."""
    first = comparison.first_difference
    return None if first is None else first.stage
