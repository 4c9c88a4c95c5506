"""The encoding of a job's rows by its options."""

from dataclasses import dataclass
from pathlib import Path

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.writers.output_file import MakeFormat
from idefics2_engine.jobs.writers.row_error import make_row_error, row_error_of
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer, encode_error
from idefics2_engine.outputs import RequestOutput

_INCOMPLETE = (
    "the answer must satisfy structured_outputs, got one that max_tokens cut off; its text is kept "
    "(--on-incomplete keep writes the row as an answer)"
)


@dataclass(frozen=True)
class OutputEncoding:
    """Encodes rows, as ``RowEncoding`` asks.

    Attributes:
        save: What the output has besides text.
        make_format: Makes the format of the output.
        media_root: Errors name files relative to this folder.
        on_incomplete: Whether a row is an error row if ``max_tokens`` cut off an answer that has to
            satisfy a constraint (``"error"``), or an answered one (``"keep"``).
    """

    save: SaveOptions
    make_format: MakeFormat
    media_root: Path | None
    on_incomplete: str = "error"

    def answer(self, row: JobRow, output: RequestOutput) -> bytes:
        """Return the JSON object of an answered row."""
        error = None
        if self.on_incomplete == "error" and _is_incomplete(row, output):
            error = make_row_error("structured", _INCOMPLETE)
        return encode_answer(row, output, self.save, error)

    def error(self, row: JobRow, error: RowError) -> bytes:
        """Return the JSON object of an error row."""
        return encode_error(row, error)

    def error_of(self, error: Idefics2Error) -> RowError:
        """Return what an error row says about an error of the engine."""
        return row_error_of(error, self.media_root)


def _is_incomplete(row: JobRow, output: RequestOutput) -> bool:
    """Return whether an answer of a row with a constraint was cut off."""
    params = row.sampling_params
    is_constrained = params is not None and params.constraint is not None
    return is_constrained and any(one.finish_reason == "length" for one in output.outputs)
