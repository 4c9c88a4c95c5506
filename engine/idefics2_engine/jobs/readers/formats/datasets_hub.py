"""Datasets of the hub, streamed row by row. Images are not decoded."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.images.loader import MAX_BYTES
from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.files.named_files import printable, reading
from idefics2_engine.jobs.readers.source import RawRow

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_NAME = re.compile(
    rf"(?:hf:)?({_PART}/{_PART})(?:@([\w./-]{{1,200}}))?:([\w.-]{{1,200}})", re.ASCII
)


class HubSource:
    """Rows of one split of a dataset.

    The hub's settings apply (``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``, …). Without a revision
    the dataset may change between two runs of a job.

    Some datasets have images as paths of their own files. These files are read here, because the
    engine opens no remote storage for a row.

    Args:
        name: ``hf:org/name:split`` or ``hf:org/name@revision:split``.
        options: Its ``columns_needed`` names the columns to read; None is all of them. Image files
            must have at most its ``max_media_bytes``.

    Raises:
        ConfigError: The name has another form, or ``datasets`` is not installed.
        JobError: On reading: the dataset cannot be found or read.
    """

    form = "columns"

    def __init__(self, name: str, options: object) -> None:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ConfigError(f"{printable(name)}: must be hf:org/name:split")
        self.files: tuple[Path, ...] = ()
        self._dataset, self._revision, self._split = found.groups()
        self._shown = f"hf:{name.removeprefix('hf:')}"
        self._needed: tuple[str, ...] | None = getattr(options, "columns_needed", None)
        self._most_bytes: int = getattr(options, "max_media_bytes", MAX_BYTES)
        self._datasets = import_extra("datasets", "datasets")

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows of the split."""
        number = 0
        with reading(self._shown):
            rows = iter(self._open())
        while True:
            with reading(self._shown, f"at row {number}"):
                row = next(rows, None)
            if row is None:
                return
            place = f"{self._shown}: row {number}"
            try:
                yield RawRow(place, {name: self._value(row[name], name) for name in row})
            except BadRowError as error:
                yield RawRow(place, None, error.row_error)
            number += 1

    def _open(self) -> Any:
        dataset = self._datasets.load_dataset(
            self._dataset, revision=self._revision, split=self._split, streaming=True
        )
        # Unknown features are those without a type that would be decoded
        if dataset.features is not None:
            dataset = dataset.decode(False)
            if self._needed is not None:
                dataset = dataset.select_columns([n for n in self._needed if n in dataset.features])
        return dataset

    def _value(self, value: Any, column: str) -> Any:
        """Return a value in which files of the dataset are replaced by their bytes."""
        if isinstance(value, list):
            return [self._value(one, column) for one in value]
        if not isinstance(value, Mapping) or value.keys() != {"bytes", "path"}:
            return value
        path = value["path"]
        if value["bytes"] is not None or not isinstance(path, str) or not self._is_own(path):
            return value
        fsspec = import_extra("fsspec", "remote")
        try:
            with fsspec.open(path, "rb") as file:
                content = file.read(self._most_bytes + 1)
        # The storage, archives and the network raise many classes
        except Exception as error:
            raise BadRowError(
                "media_fetch",
                f"column {short_repr(column)}: a file of the dataset cannot be read: "
                f"{type(error).__name__}",
            ) from error
        if len(content) > self._most_bytes:
            raise BadRowError(
                "image",
                f"column {short_repr(column)}: a file of the dataset must have at most "
                f"{self._most_bytes} bytes, got more",
            )
        return {"bytes": content, "path": None}

    def _is_own(self, path: str) -> bool:
        """Return whether a path, also one in an archive, is of this dataset's repository."""
        inside, _, address = path.rpartition("::")
        schemes = {part.partition("://")[0] for part in inside.split("::") if part}
        place = f"hf://datasets/{self._dataset}"
        is_own = address.startswith((f"{place}/", f"{place}@")) and ".." not in address.split("/")
        return is_own and schemes <= {"zip", "tar"}
