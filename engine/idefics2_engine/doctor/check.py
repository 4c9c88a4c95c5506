"""One check: what was found, how good it is, and the fix."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How good a finding is, from the best to the worst."""

    OK = "ok"
    WARNING = "warning"
    """Something is slower, smaller or less tested than it could be."""
    PROBLEM = "problem"
    """Something does not work."""


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: Name, unique in a report.
        status: How good it is.
        found: What was found, in one line.
        fix: A command or a sentence. It is empty if there is nothing to do.
        details: The same facts for JSON.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the check for JSON."""
        return {
            "name": self.name,
            "status": self.status.value,
            "found": self.found,
            "fix": self.fix,
            "details": self.details,
        }


def worst(checks: Iterable[Check]) -> Status:
    """Return the worst status, ``OK`` without checks."""
    order = list(Status)
    return max((check.status for check in checks), key=order.index, default=Status.OK)
