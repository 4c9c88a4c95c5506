"""The exception for a row that cannot be read, which costs no other row anything."""

from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.writers.row_error import make_row_error


class BadRowError(Exception):
    """A row cannot be used.

    Args:
        code: A code of ``writers.row_error.STAGES``.
        message: What was wrong, wanted and got. It must be the same for the same row.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    @property
    def row_error(self) -> RowError:
        """The error as the output has it."""
        return make_row_error(self.code, self.message)
