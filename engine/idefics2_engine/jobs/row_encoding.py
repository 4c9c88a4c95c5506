"""The encoding of a job's rows by its options."""

from dataclasses import dataclass
from pathlib import Path

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.writers.output_file import MakeFormat
from idefics2_engine.jobs.writers.row_error import row_error_of
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer, encode_error
from idefics2_engine.outputs import RequestOutput


@dataclass(frozen=True)
class OutputEncoding:
    """Encodes rows, as ``RowEncoding`` asks.

    Attributes:
        save: What the output has besides text.
        make_format: Makes the format of the output.
        media_root: Errors name files relative to this folder.
    """

    save: SaveOptions
    make_format: MakeFormat
    media_root: Path | None

    def answer(self, row: JobRow, output: RequestOutput) -> bytes:
        """Return the JSON object of an answered row."""
        return encode_answer(row, output, self.save)

    def error(self, row: JobRow, error: RowError) -> bytes:
        """Return the JSON object of an error row."""
        return encode_error(row, error)

    def error_of(self, error: Idefics2Error) -> RowError:
        """Return what an error row says about an error of the engine."""
        return row_error_of(error, self.media_root)
