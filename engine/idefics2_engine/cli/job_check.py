"""The check of a job's input before the model is loaded, and what the job has in all."""

from collections.abc import Callable, Iterator
from typing import cast

from idefics2_engine.cli.job_progress import JobTotals, answer_tokens
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.row_ids import RowId
from idefics2_engine.jobs.readers.validation import Validation, validate


class _Measured:
    """An input whose answers are counted while its rows are checked, to read them only once."""

    def __init__(self, job_input: JobInput) -> None:
        self.options = job_input.options
        self.find_repeated_ids = job_input.find_repeated_ids
        self.tokens: int | None = 0
        self._input = job_input

    def rows(self, on_id: Callable[[RowId], None] | None = None) -> Iterator[JobRow]:
        for row in self._input.rows(on_id):
            tokens = answer_tokens(row)
            self.tokens = None if tokens is None or self.tokens is None else self.tokens + tokens
            yield row


def check_input(job_input: JobInput) -> tuple[Validation, JobTotals]:
    """Read all rows; return what is wrong with them, and how much there is to do.

    Raises:
        ConfigError: A file cannot be read.
        OSError: Reading fails.
    """
    measured = _Measured(job_input)
    validation = validate(cast(JobInput, measured))
    return validation, JobTotals(validation.num_rows, measured.tokens)
