"""The table of keywords in ``docs/structured-output.md``, from the cases of the tests."""

import re
from pathlib import Path

from idefics2_engine.structured.json_schema import ANNOTATIONS
from structured_cases import KEYWORDS, REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs/structured-output.md"
_TABLE = re.compile(r"(<!-- keywords -->\n).*?(<!-- /keywords -->)", re.DOTALL)


def renewed_page() -> str:
    """Return the page with the current table."""
    rows = [
        ("enforced", "answers without it in their schema would differ", [*KEYWORDS]),
        ("annotation", "says nothing of the value, so it is accepted", [*ANNOTATIONS]),
        ("refused", "`SamplingError` with its path, as any other keyword", [*REFUSED]),
    ]
    lines = ["| keywords | | |", "|---|---|---|"]
    for kind, why, names in rows:
        quoted = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {quoted} | {kind} | {why} |")
    table = "\n".join(lines)
    return _TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", PAGE.read_text("utf-8"))
