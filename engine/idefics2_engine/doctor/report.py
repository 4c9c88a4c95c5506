"""The report of the checks, as lines or as data for JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from idefics2_engine import __version__
from idefics2_engine.doctor.check import Check, Status, worst

_NAME_WIDTH = 17
_STATUS_WIDTH = 7


def check_line(check: Check) -> str:
    """Return the line of a check: status, name, what was found, and the fix."""
    fix = f" | fix: {check.fix}" if check.fix else ""
    text = f"{check.status.value:{_STATUS_WIDTH}}  {check.name:{_NAME_WIDTH}}  {check.found}{fix}"
    # What a program printed may have control characters
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def summary_line(checks: Sequence[Check]) -> str:
    """Return the last line: how many problems and warnings there are."""
    counts = Counter(check.status for check in checks)
    names = {Status.PROBLEM: "problem", Status.WARNING: "warning"}
    parts = [
        f"{counts[status]} {name}{'' if counts[status] == 1 else 's'}"
        for status, name in names.items()
    ]
    return f"{', '.join(parts)} in {len(checks)} checks"


def to_dict(checks: Sequence[Check], *, deep: bool) -> dict[str, Any]:
    """Return the report for JSON."""
    return {
        "version": __version__,
        "status": worst(checks).value,
        "deep": deep,
        "checks": [check.to_dict() for check in checks],
    }
