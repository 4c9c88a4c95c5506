"""The check of an input before the model is loaded: every bad row, not only the first."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.rows.row_ids import IdHashes, RepeatedId

_MOST_SHOWN = 20


class Validation(NamedTuple):
    """What was found.

    Attributes:
        num_rows: Number of rows.
        num_bad: Number of those with an error.
        counts: Number of errors by code, the most frequent first.
        bad_rows: The first 20 rows with an error.
        num_repeated: Number of rows of the whole job whose identifier an earlier row has. 0 if they
            get others.
        repeated: The first 20 of them, with the places of both rows.
        empty_columns: Columns to keep that are missing or null in every row without an error.
    """

    num_rows: int
    num_bad: int
    counts: Mapping[str, int]
    bad_rows: tuple[JobRow, ...]
    num_repeated: int
    repeated: tuple[RepeatedId, ...]
    empty_columns: tuple[str, ...]


def validate(
    job_input: JobInput,
    find_error: Callable[[JobRow], RowError | None] = lambda row: None,
    on_row: Callable[[JobRow], None] = lambda row: None,
) -> Validation:
    """Read all rows and return what is wrong with them.

    Args:
        job_input: The input.
        find_error: Returns the error of a row without one, such as of its images, which are not
            read here.
        on_row: Called with each row, for what else is to be known of all rows.

    Raises:
        JobError: A file cannot be read.
        OSError: Reading fails.
    """
    counts: Counter[str] = Counter()
    bad_rows: list[JobRow] = []
    empty = set(job_input.options.keep)
    num_rows = 0
    hashes = IdHashes()
    for row in job_input.rows(hashes.add):
        num_rows += 1
        on_row(row)
        error = row.error or find_error(row)
        if error is not None:
            counts[error.code] += 1
            if len(bad_rows) < _MOST_SHOWN:
                bad_rows.append(row if row.error else replace(row, error=error))
        elif empty:
            empty -= {name for name, value in row.keep.items() if value is not None}
    num_repeated, repeated = job_input.find_repeated_ids(hashes, _MOST_SHOWN)
    return Validation(
        num_rows=num_rows,
        num_bad=counts.total(),
        counts=dict(counts.most_common()),
        bad_rows=tuple(bad_rows),
        num_repeated=num_repeated,
        repeated=repeated,
        empty_columns=tuple(name for name in job_input.options.keep if name in empty),
    )
