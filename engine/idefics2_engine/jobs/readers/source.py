"""What a source of rows is: the contract between formats of files and the forms of rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from idefics2_engine.jobs.job_row import RowError


class RawRow(NamedTuple):
    """One row as its file has it.

    Attributes:
        place: Where the row is, such as ``questions.jsonl: line 12``, for messages to the operator.
        columns: Names and values. None if the row cannot be parsed. Images are a path (relative to
            the media root), bytes, ``{"bytes": ..., "path": ...}``, or a list of these.
        error: Why the row cannot be parsed.
        default_id: The source's own identifier of the row, such as a file's path below the folder.
    """

    place: str
    columns: Mapping[str, Any] | None
    error: RowError | None = None
    default_id: str | None = None


class Source(Protocol):
    """Raw rows of one input, read lazily. Every iteration yields the same rows.

    Attributes:
        form: How columns become a prompt: ``plain`` (JSON object), ``openai`` or ``columns``.
        files: Local files that determine the rows. Empty for the hub.
    """

    form: str
    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows from the first one."""


UNREAD = RawRow("", None)
"""In place of a row whose content is not asked for."""


@runtime_checkable
class SkippingSource(Source, Protocol):
    """A source whose rows cost little if their content is not asked for."""

    def rows_behind(self, count: int) -> Iterator[RawRow]:
        """Yield all rows, of which the first ``count`` may be ``UNREAD``."""


def rows_behind(source: Source, count: int) -> Iterator[RawRow]:
    """Yield all rows of a source. The content of the first ``count`` is not asked for."""
    return source.rows_behind(count) if isinstance(source, SkippingSource) else iter(source)
