"""Options of a job's run, on which the bytes of its output do not depend."""

import re
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.field_checks import (
    ListOf,
    MismatchError,
    Number,
    OneOf,
    OrNone,
    Whole,
    check_fields,
    checked,
    flag,
    text,
)
from idefics2_engine.runtime.config import default_num_seqs

RETRIED_CODES = frozenset({"media_fetch", "request_failed", "worker_lost"})
"""Errors that may go away: a row with one of them is computed again by itself."""

IN_FLIGHT = 2 * default_num_seqs(on_gpu=True)
"""Rows in flight by default."""
# The window holds so many times the rows in flight, so that one slow row does not stop the reading
_WINDOWS_PER_IN_FLIGHT = 16
_LEAST_ROWS = 200
_MOST_ROWS = 2**31 - 1
_MOST_SECONDS = 86400.0
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?) ?%")


class ErrorLimit(NamedTuple):
    """How many rows may be errors: a number, or a share of the finished rows."""

    rows: float = inf
    share: float = 1.0

    def is_exceeded(self, errors: int, rows: int) -> bool:
        """Return whether ``errors`` of ``rows`` are too many; fewer than 200 rows never have."""
        return rows >= _LEAST_ROWS and (errors > self.rows or errors > self.share * rows)

    def __str__(self) -> str:
        """Return the limit as it is written."""
        return f"{self.share * 100:g}%" if self.rows == inf else f"{self.rows:g}"


def error_limit(value: object) -> ErrorLimit:
    """Accept a limit, a number of rows, and text such as ``5`` or ``2.5%``."""
    if isinstance(value, ErrorLimit):
        return value
    found = rows_or_percent(value)
    return ErrorLimit(rows=found) if isinstance(found, int) else ErrorLimit(share=found)


def rows_or_percent(value: object) -> int | float:
    """Return a number of rows as an integer, or the share of a percentage such as ``2.5%``.

    Raises:
        MismatchError: The value is neither.
    """
    wanted = "a number of rows or a percentage such as 5%"
    if isinstance(value, str):
        if percent := _PERCENT.fullmatch(value.strip()):
            if float(percent[1]) > 100:
                raise MismatchError(wanted, short_repr(value))
            return float(percent[1]) / 100
        value = int(value) if re.fullmatch(r"\d{1,10}", value.strip()) else value
    try:
        return Whole(0, _MOST_ROWS)(value)
    except MismatchError:
        raise MismatchError(wanted, short_repr(value)) from None


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Validated options of a run.

    Attributes:
        window: Rows that are read ahead of the oldest row that is missing. If ``None``, 16 times
            ``in_flight``.
        in_flight: Rows that the engine has at once.
        max_prepared_bytes: Bytes of prepared images at which the engine reads no further row.
        retries: How often a row is computed again after ``request_failed``, ``worker_lost`` or
            ``media_fetch``.
        retry_errors: Codes of error rows of an earlier run that are computed again; all codes if it
            is empty, and no row if it is ``None``.
        max_errors: Error rows at which the job ends, once it has 200 rows: a number, or a
            percentage of them.
        on_bad_row: ``"error-row"`` goes on after a row that cannot be parsed, and ``"stop"`` ends
            the job before the model is loaded.
        drain_timeout: Seconds that rows in flight get after the first interrupt.
        overwrite: Move a file at the output's place aside that no job made.
        restart: Move the old job aside and begin again.
        force_resume: Resume a job whose fingerprint differs.
        stats: Write a line of times for each row beside the output.

    Raises:
        ConfigError: A value is of the wrong type or out of range, or two contradict each other.
    """

    window: int | None = checked(OrNone(Whole(1, _MOST_ROWS)), None)
    in_flight: int = checked(Whole(1, _MOST_ROWS), IN_FLIGHT)
    max_prepared_bytes: int = checked(Whole(1), 2 << 30)
    retries: int = checked(Whole(0, 100), 1)
    retry_errors: tuple[str, ...] | None = checked(OrNone(ListOf(text, "codes")), None)
    max_errors: ErrorLimit = checked(error_limit, ErrorLimit())
    on_bad_row: str = checked(OneOf("error-row", "stop"), "error-row")
    drain_timeout: float = checked(Number(0.0, _MOST_SECONDS), 30.0)
    overwrite: bool = checked(flag, False)
    restart: bool = checked(flag, False)
    force_resume: bool = checked(flag, False)
    stats: bool = checked(flag, False)

    def __post_init__(self) -> None:
        """Check every option, then combinations of them."""
        check_fields(self, ConfigError)
        if self.restart and self.force_resume:
            raise ConfigError("restart begins a new job: it must come without force_resume")

    @property
    def window_rows(self) -> int:
        """Rows that are read ahead of the oldest row that is missing."""
        return self.window or _WINDOWS_PER_IN_FLIGHT * self.in_flight

    @property
    def rows_in_memory(self) -> int:
        """Most finished rows that wait in memory; a larger window has the others in the journal."""
        return min(self.window_rows, _WINDOWS_PER_IN_FLIGHT * self.in_flight)

    def is_retried(self, code: str) -> bool:
        """Return whether an error row of an earlier run with this code is computed again."""
        return self.retry_errors is not None and (
            not self.retry_errors or code in self.retry_errors
        )
