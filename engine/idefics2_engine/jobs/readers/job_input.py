"""The input of a job: all its rows, lazily, and the same ones each time."""

import sys
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.formats.input_paths import (
    HUB_FORMAT,
    find_inputs,
    identify_input,
    media_root,
)
from idefics2_engine.jobs.readers.formats.open_sources import open_sources
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.row_selection import (
    NumberedRow,
    sampled_numbers,
    select,
)
from idefics2_engine.jobs.readers.rows.row_builder import IdentifiedRow, RowBuilder
from idefics2_engine.jobs.readers.rows.row_ids import (
    IdHashes,
    IdSuffixes,
    PlacedId,
    RepeatedIds,
    RowId,
    find_repeated,
)
from idefics2_engine.jobs.readers.source import SkippingSource, rows_behind
from idefics2_engine.jobs.store.input_files import InputFile
from idefics2_engine.sampling_params import SamplingParams

# Their columns without a use are ignored, so a wrong name of a column goes unnoticed
_TABLE_FORMATS = ("parquet", "csv", HUB_FORMAT)
_IDENTIFIED_AT_ONCE = 16


class JobInput:
    """Rows of files, none of whose images is decoded.

    The files must not change while they are read. Several iterators may be used at once, also on
    several threads.

    Args:
        options: What to read, and how.
        defaults: Sampling parameters of rows that give none.

    Attributes:
        options: The options.
        files: Local files that determine the rows.
        media_root: Folder of the images that rows name.
        template: The job's prompt. None if rows have their own.

    Raises:
        JobError: A file cannot be read.
        ConfigError: Options do not fit the files, or a library is missing.
    """

    def __init__(self, options: InputOptions, defaults: SamplingParams) -> None:
        self._inputs = inputs = find_inputs(options.inputs, options.input_format)
        self.options = options
        self.media_root: Path = options.media_root or media_root(inputs)
        template = options.read_template()
        self.template = None if template is None else template.text
        if template is None and any(one.format == "images" for one in inputs):
            raise ConfigError(
                "images of a folder need a question for all of them (prompt or --prompt), got none"
            )
        self._sources = open_sources(inputs, options)
        self.files: tuple[Path, ...] = tuple(
            path for source in self._sources for path in source.files
        )
        if template is not None and any(source.form == "openai" for source in self._sources):
            raise ConfigError("prompt must be in the rows of OpenAI lines, got one for the job")
        self._builder = RowBuilder.of(options, self.media_root, defaults)

    def rows(
        self, on_id: Callable[[RowId], None] | None = None, *, begin: int = 0
    ) -> Iterator[JobRow]:
        """Yield the rows of the job, or of its shard, from index ``begin`` on.

        Takes and raises what ``identified_rows`` does.
        """
        return map(self._builder.build, self.identified_rows(on_id, begin=begin))

    def identified_rows(
        self, on_id: Callable[[RowId], None] | None = None, *, begin: int = 0
    ) -> Iterator[IdentifiedRow]:
        """Yield the same rows as ``rows``, for a ``RowBuilder`` to look at their content.

        Repeated identifiers are replaced if the options say so, and otherwise not looked for.

        Args:
            on_id: Called with the identifier of each row, in order, also of other shards and of
                rows before ``begin``.
            begin: Index of the first row.

        Raises:
            JobError: A file cannot be read.
            OSError: Reading fails.
        """
        shard, builder = self.options.shard, self._builder
        unique = None
        if self.options.on_duplicate_id == "suffix":
            unique = IdSuffixes(self._id_hashes).unique
        needs_ids = unique is not None or on_id is not None
        first = 0 if needs_ids else self._number_at(begin * shard.num_parts)
        for position, row in enumerate(self._selected(first)):
            index, part = divmod(position, shard.num_parts)
            is_wanted = part == shard.part and index >= begin
            # Identifiers of other shards count, so that all shards together are the whole job
            if is_wanted or needs_ids:
                row_id = builder.row_id(row.raw, row.form, row.number)
                if unique is not None:
                    row_id = unique(row_id)
                if on_id is not None:
                    on_id(row_id)
                if is_wanted:
                    yield IdentifiedRow(index, row.number, row_id, row.form, row.raw)

    @property
    def can_skip(self) -> bool:
        """Whether rows before ``begin`` cost little. Remote files would be transferred twice."""
        is_local = all(one.folder is not None for one in self._inputs)
        return is_local and all(isinstance(one, SkippingSource) for one in self._sources)

    def find_repeated_ids(self, hashes: IdHashes, most: int) -> RepeatedIds:
        """Return rows of the whole job whose identifier an earlier row has, the first ``most``.

        Args:
            hashes: Those of all rows. The rows are read again if some are equal.
            most: Number of rows to return.

        Raises:
            JobError: A file cannot be read.
            OSError: Reading fails.
        """
        return find_repeated(hashes, self._placed_ids(), most)

    def identify(self) -> tuple[InputFile, ...]:
        """Return the identity of all files that determine the rows.

        It is empty if one is of the hub, because nothing says whether that has changed.

        Raises:
            JobError: A file that is not on this machine cannot be found.
            OSError: A file cannot be found.
        """
        if any(one.format == HUB_FORMAT for one in self._inputs):
            return ()
        # A storage answers for one file at a time
        with ThreadPoolExecutor(_IDENTIFIED_AT_ONCE, "idefics2-identify") as pool:
            return tuple(pool.map(identify_input, self._inputs))

    def fingerprint_parts(self) -> dict[str, Any]:
        """Return JSON data for the fingerprint: what the rows depend on beside the files."""
        options = self.options
        return {
            "template": self.template,
            "keep": list(options.keep),
            "limit": options.limit,
            "sample": options.sample,
            "sample_seed": options.sample_seed if options.sample is not None else None,
            "shard": list(options.shard),
            "on_duplicate_id": options.on_duplicate_id,
            "hash_media": options.hash_media,
            "check_model": options.check_model,
            "columns": [
                options.id_column,
                options.image_column,
                options.prompt_column,
                options.messages_column,
            ],
        }

    @property
    def has_tables(self) -> bool:
        """Whether an input is a table, whose other columns are not looked at."""
        return any(one.format in _TABLE_FORMATS for one in self._inputs)

    @cached_property
    def _id_hashes(self) -> IdHashes:
        hashes = IdHashes()
        for row in self._placed_ids():
            hashes.add(row.id)
        return hashes

    @cached_property
    def _sampled(self) -> "array[int] | None":
        """Numbers of the rows that were chosen at random."""
        size = self.options.sample
        if size is None:
            return None
        num_rows = sum(1 for _ in self._numbered(sys.maxsize))
        return sampled_numbers(num_rows, size, self.options.sample_seed)

    def _placed_ids(self) -> Iterator[PlacedId]:
        for row in self._selected():
            row_id = self._builder.row_id(row.raw, row.form, row.number)
            yield PlacedId(row_id, row.raw.place)

    def _number_at(self, position: int) -> int:
        """Return the number of the row at a position among the selected ones, which may not be."""
        if self._sampled is None:
            return position
        return self._sampled[position] if position < len(self._sampled) else sys.maxsize

    def _selected(self, first: int = 0) -> Iterator[NumberedRow]:
        return select(self._numbered(first), self._sampled, self.options.limit)

    def _numbered(self, first: int = 0) -> Iterator[NumberedRow]:
        """Yield all rows; the content of those whose number is below ``first`` is not asked for."""
        number = 0
        for source in self._sources:
            for raw in rows_behind(source, max(0, first - number)):
                yield NumberedRow(number, raw, source.form)
                number += 1
