"""The check of a job's input before the model is loaded, and what the job has in all."""

from idefics2_engine.cli.job_progress import JobTotals, answer_tokens
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.validation import Validation, validate


def check_input(job_input: JobInput) -> tuple[Validation, JobTotals]:
    """Read all rows; return what is wrong with them, and how much there is to do.

    Raises:
        ConfigError: A file cannot be read.
        OSError: Reading fails.
    """
    total: int | None = 0

    def count(row: JobRow) -> None:
        nonlocal total
        tokens = answer_tokens(row)
        total = None if tokens is None or total is None else total + tokens

    validation = validate(job_input, count)
    return validation, JobTotals(validation.num_rows, total)
