"""How many rows of a job are also computed on the reference path."""

from typing import NamedTuple

from idefics2_engine.errors import ConfigError
from idefics2_engine.field_checks import MismatchError
from idefics2_engine.jobs.job_options import rows_or_percent

MAX_SHADOW_ROWS = 1000
"""The rows and their answers are in memory until the end of the run."""


class ShadowSize(NamedTuple):
    """How many rows are chosen: a number, or a share of all rows and at most 1,000."""

    rows: int = MAX_SHADOW_ROWS
    share: float = 1.0


def shadow_size(text: str) -> ShadowSize:
    """Parse a size such as ``5`` or ``0.1%``.

    Raises:
        ConfigError: The text is not such a size, or it is 0 or too large.
    """
    try:
        found = rows_or_percent(text)
    except MismatchError:
        found = 0
    if isinstance(found, int) and 1 <= found <= MAX_SHADOW_ROWS:
        return ShadowSize(rows=found)
    if isinstance(found, float) and found > 0:
        return ShadowSize(share=found)
    raise ConfigError(
        f"--shadow must be 1 to {MAX_SHADOW_ROWS} rows, or a percentage such as 0.1%, got {text!r}"
    )
