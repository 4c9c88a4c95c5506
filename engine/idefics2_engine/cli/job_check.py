"""The check of a job's input before the model is loaded, and what the job has in all."""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from idefics2_engine.cli import options
from idefics2_engine.cli.job_progress import JobTotals, answer_tokens
from idefics2_engine.images.loader import media_config
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.plan import image_check as image_checks
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.validation import Validation, validate

_MOST_SHOWN = 20

ImageCheck = Callable[[JobRow], RowError | None]
"""Returns the error of a row whose images cannot be used, without decoding them."""


def image_check(args: argparse.Namespace, media_root: Path) -> ImageCheck | None:
    """Return the check of ``--check-images``, ``None`` for none."""
    if args.check_images == "none":
        return None
    media = media_config(**options.media_settings(args), allowed_media_root=media_root)
    check = image_checks.ImageCheck.named(args.check_images)
    return lambda row: image_checks.image_error(row, check, media)


def check_input(
    job_input: JobInput, image_error: ImageCheck | None
) -> tuple[Validation, JobTotals]:
    """Read all rows; return what is wrong with them, and how much there is to do.

    Raises:
        ConfigError: A file cannot be read.
        OSError: Reading fails.
    """
    total: int | None = 0
    codes: Counter[str] = Counter()
    bad_rows: list[JobRow] = []

    def look(row: JobRow) -> None:
        nonlocal total
        tokens = answer_tokens(row)
        total = None if tokens is None or total is None else total + tokens
        error = row.error
        if error is None and image_error is not None:
            error = image_error(row)
        if error is not None:
            codes[error.code] += 1
            if len(bad_rows) < _MOST_SHOWN:
                bad_rows.append(replace(row, error=error))

    validation = validate(job_input, look)
    validation = validation._replace(
        num_bad=codes.total(), counts=dict(codes.most_common()), bad_rows=tuple(bad_rows)
    )
    return validation, JobTotals(validation.num_rows, total)
