"""Inputs of jobs, for tests of what reads them. Without torch."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.source import RawRow
from idefics2_engine.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=7)


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """Write a line for each row: bytes as they are, other values as JSON."""
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def input_options(*names: str, **options: Any) -> InputOptions:
    return InputOptions(inputs=names, **options)


def job_input(*paths: Path | str, **options: Any) -> JobInput:
    return JobInput(input_options(*map(str, paths), **options), DEFAULTS)


def read_rows(*paths: Path | str, **options: Any) -> list[JobRow]:
    return list(job_input(*paths, **options).rows())


def text_of(row: JobRow) -> str:
    """Return the text of a row's only message."""
    assert row.prompt is not None
    assert isinstance(row.prompt, list)
    (message,) = row.prompt
    (text,) = (part["text"] for part in message["content"] if part["type"] == "text")
    return str(text)


def images_of(row: JobRow) -> list[Any]:
    """Return the sources of a row's images, in all its messages."""
    assert isinstance(row.prompt, list)
    parts = [part for message in row.prompt for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def error_of(row: JobRow) -> RowError:
    assert row.error is not None
    assert row.prompt is None
    return row.error


def comparable(row: JobRow) -> tuple[Any, ...]:
    """Return everything of a row, since rows are equal only to themselves."""
    return tuple(getattr(row, name) for name in JobRow.__slots__)


class TableSource:
    """A stand-in for tables: rows of a list, which must be JSON data or bytes."""

    form = "columns"

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.files: tuple[Path, ...] = ()
        self._rows = list(rows)

    def __iter__(self) -> Iterator[RawRow]:
        for number, columns in enumerate(self._rows):
            yield RawRow(f"table: row {number}", columns)
