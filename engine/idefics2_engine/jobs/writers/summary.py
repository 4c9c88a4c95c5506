"""``OUT.summary.json``: what a job counted, how long its last run took, and where it waited."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class RowTotals(Protocol):
    """Counts of rows, and of what answered rows have."""

    @property
    def rows(self) -> int:
        """All rows."""

    @property
    def errors(self) -> Mapping[str, int]:
        """Error rows by code."""

    @property
    def images(self) -> int:
        """Images."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts, with image tokens."""

    @property
    def image_tokens(self) -> int:
        """Image tokens."""

    @property
    def completion_tokens(self) -> int:
        """Tokens of answers."""


@dataclass(frozen=True)
class RunFigures:
    """What the last run of a job was like.

    Attributes:
        seconds: Duration, without loading the model.
        load_seconds: Time in which the model was loaded.
        attempts: Rows that the engine was asked for, repeated ones each time.
        workers: Processes that answered rows; 1 without worker processes.
        patches: Patches of images that were encoded or found. ``None`` if that is not known.
        waits: Seconds that each stage waited, by its name. ``None`` if that is not known.
        advice: Which option to change. ``None`` if the device did not starve.
        shadow: What comparing rows with the reference path took. ``None`` if none was asked for.
        bitwise: Whether another run gives the same bytes.
    """

    seconds: float
    load_seconds: float = 0.0
    attempts: int = 0
    workers: int = 1
    patches: int | None = None
    waits: Mapping[str, float | None] = field(default_factory=dict)
    advice: str | None = None
    shadow: Mapping[str, Any] | None = None
    bitwise: bool = False


def summary_of(
    job: RowTotals,
    run: RowTotals,
    figures: RunFigures,
    shadow: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a summary.

    Args:
        job: Counts of all rows of the output.
        run: Counts of rows that the last run computed, which rates are of.
        figures: What the last run was like.
        shadow: Agreement of rows with the reference path. ``None`` if none was asked for.
    """
    return {
        **_counts(job),
        "run": {
            **_counts(run),
            "patches": figures.patches,
            "attempts": figures.attempts,
            "workers": figures.workers,
            "load_seconds": figures.load_seconds,
            "seconds": figures.seconds,
            "per_second": {
                "rows": _rate(run.rows, figures.seconds),
                "images": _rate(run.images, figures.seconds),
                "prompt_tokens": _rate(run.prompt_tokens, figures.seconds),
                "completion_tokens": _rate(run.completion_tokens, figures.seconds),
            },
            "waits": dict(figures.waits),
            "advice": figures.advice,
            **({} if figures.shadow is None else {"shadow": dict(figures.shadow)}),
        },
        "bitwise": figures.bitwise,
        **({} if shadow is None else {"shadow": dict(shadow)}),
    }


def _counts(totals: RowTotals) -> dict[str, Any]:
    num_errors = sum(totals.errors.values())
    return {
        "rows": {
            "all": totals.rows,
            "answered": totals.rows - num_errors,
            "errors": num_errors,
        },
        "errors": dict(sorted(totals.errors.items())),
        "images": totals.images,
        "tokens": {
            "prompt": totals.prompt_tokens,
            "image": totals.image_tokens,
            "completion": totals.completion_tokens,
        },
    }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None
