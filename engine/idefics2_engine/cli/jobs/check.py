"""The check of a job's input before the model is loaded, and what the job has in all."""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.cli.jobs import job_options
from idefics2_engine.cli.jobs.progress import JobTotals, answer_tokens
from idefics2_engine.images.sources.source_check import SourceCheck
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.plan.image_check import ImageCheck, image_error, images_of
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.validation import Validation, validate
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_status import same_job


class InputCheck(NamedTuple):
    """What is known of an input before the model is loaded.

    Attributes:
        validation: What is wrong with the rows.
        totals: How much there is to do.
        lacks_images: Whether an input is a table and no row has an image.
    """

    validation: Validation
    totals: JobTotals
    lacks_images: bool


def checked_before(args: argparse.Namespace, job: JobDescription) -> JobTotals | None:
    """Return what a job has in all, if its last start checked exactly this input in this way."""
    before = same_job(Path(args.output), job)
    if before is None or args.restart or args.on_bad_row == "stop":
        return None
    rows, tokens = (before.options.get(name) for name in ("rows", "answer_tokens"))
    if before.options.get("check_images") != args.check_images or not isinstance(rows, int):
        return None
    return JobTotals(rows, tokens)


def check_input(args: argparse.Namespace, job_input: JobInput) -> InputCheck:
    """Read all rows of an input, and look at their images as far as the options want.

    Raises:
        ConfigError: A rule for images is invalid, or a file cannot be read.
        OSError: Reading fails.
    """
    total: int | None = 0
    lacks_images = job_input.has_tables

    def look(row: JobRow) -> None:
        nonlocal total, lacks_images
        tokens = answer_tokens(row)
        total = None if tokens is None or total is None else total + tokens
        lacks_images = lacks_images and not images_of(row)

    media = job_options.job_media(args, job_input.media_root)
    find_error = partial(
        image_error,
        check=ImageCheck(args.check_images),
        media=media,
        check_file=SourceCheck(media),
    )
    validation = validate(job_input, find_error, look)
    return InputCheck(validation, JobTotals(validation.num_rows, total), lacks_images)
