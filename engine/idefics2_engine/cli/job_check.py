"""The check of a job's input before the model is loaded, and what the job has in all."""

import argparse
from functools import partial

from idefics2_engine.cli import job_options
from idefics2_engine.cli.job_progress import JobTotals, answer_tokens
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.plan.image_check import ImageCheck, image_error
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.validation import Validation, validate


def check_input(args: argparse.Namespace, job_input: JobInput) -> tuple[Validation, JobTotals]:
    """Read all rows; return what is wrong with them, and how much there is to do.

    Raises:
        ConfigError: A rule for images is invalid, or a file cannot be read.
        OSError: Reading fails.
    """
    total: int | None = 0

    def count_tokens(row: JobRow) -> None:
        nonlocal total
        tokens = answer_tokens(row)
        total = None if tokens is None or total is None else total + tokens

    find_error = partial(
        image_error,
        check=ImageCheck(args.check_images),
        media=job_options.job_media(args, job_input.media_root),
    )
    validation = validate(job_input, find_error, count_tokens)
    return validation, JobTotals(validation.num_rows, total)
