"""From raw rows to rows of a job: identifier, key, prompt, parameters and kept columns."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.json_line import json_type
from idefics2_engine.jobs.readers.rows.columns_form import ColumnsForm
from idefics2_engine.jobs.readers.rows.openai_form import OpenAIForm
from idefics2_engine.jobs.readers.rows.row_content import RowForm
from idefics2_engine.jobs.readers.rows.row_images import RowImages
from idefics2_engine.jobs.readers.rows.row_sampling import RowSampling
from idefics2_engine.jobs.readers.source import RawRow
from idefics2_engine.jobs.store.canonical_json import canonical_json
from idefics2_engine.sampling_params import SamplingParams

_PLAIN = (str, int, type(None))


class IdentifiedRow(NamedTuple):
    """A row whose identifier is known, and whose content has not been looked at.

    Attributes:
        position: Place among the rows of this job (of its shard), from 0 without gaps.
        number: Place in the input, from 0.
        id: Identifier of the row, unique in the job.
        form: How the columns become a prompt.
        raw: The row as its file has it.
    """

    position: int
    number: int
    id: str | int
    form: str
    raw: RawRow

    @property
    def place(self) -> str:
        """Where the row is, such as ``questions.jsonl: line 12``."""
        return self.raw.place


class RowBuilder:
    """Builds rows, good and bad ones.

    Args:
        forms: How rows are read, by the ``form`` of their source.
        defaults: Sampling parameters of the job.
        keep: Columns that the output carries.
    """

    def __init__(
        self, forms: Mapping[str, RowForm], defaults: SamplingParams, keep: tuple[str, ...]
    ) -> None:
        self._forms = forms
        self._sampling = RowSampling(defaults)
        self._keep = keep

    @classmethod
    def of(cls, options: InputOptions, media_root: Path, defaults: SamplingParams) -> "RowBuilder":
        """Return the builder of an input.

        Args:
            options: How the input is read.
            media_root: Folder of the images that rows name.
            defaults: Sampling parameters of the job.

        Raises:
            ConfigError: The prompt's template cannot be read.
        """
        template = options.read_template()
        images = RowImages(media_root, options.hash_media, options.max_media_bytes)
        forms: dict[str, RowForm] = {
            "plain": ColumnsForm(options, template, images, is_table=False),
            "columns": ColumnsForm(options, template, images, is_table=True),
            "openai": OpenAIForm(options, images),
        }
        return cls(forms, defaults, options.keep)

    def row_id(self, raw: RawRow, form: str, number: int) -> str | int:
        """Return the row's identifier, or the one that it gets if it has none or a bad one."""
        try:
            found = self._given_id(raw, self._forms[form])
        except BadRowError:
            found = None
        return _default_id(raw, number) if found is None else found

    def build(self, row: IdentifiedRow) -> JobRow:
        """Return the row, which has an error if it cannot be answered."""
        index, number, row_id, form, raw = row
        keep: dict[str, Any] = {}
        error = raw.error
        if raw.columns is not None:
            try:
                keep = self._kept(raw.columns)
                reader = self._forms[form]
                self._given_id(raw, reader)
                content = reader.read(raw.columns)
                params = self._sampling.merge(content.sampling)
                payload = (row_id, content.identity, content.sampling, keep)
                return JobRow(
                    index,
                    number,
                    row_id,
                    _key(payload),
                    raw.place,
                    content.messages,
                    params,
                    keep,
                )
            except BadRowError as bad:
                error = bad.row_error
        assert error is not None, "a row without columns has an error"
        key = _key((row_id, error, keep))
        return JobRow(index, number, row_id, key, raw.place, None, None, keep, error)

    def _given_id(self, raw: RawRow, form: RowForm) -> str | int | None:
        if raw.columns is None:
            return None
        value = raw.columns.get(form.id_column)
        if type(value) is str or value is None:
            if form.needs_id and form.id_column not in raw.columns:
                raise BadRowError(
                    "schema", f"the row must have {short_repr(form.id_column)}, got no such column"
                )
            return value
        if type(value) is not int or not -(2**63) <= value < 2**63:
            got = short_repr(value) if isinstance(value, int | float) else json_type(value)
            raise BadRowError("schema", f"the id must be a string or a 64-bit integer, got {got}")
        return value

    def _kept(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: columns.get(name) for name in self._keep}
        for name, value in kept.items():
            if not isinstance(value, _PLAIN):
                try:
                    canonical_json(value)
                except (TypeError, ValueError):
                    raise BadRowError(
                        "schema",
                        f"column {short_repr(name)} must be JSON data to be kept, "
                        f"got {json_type(value)}",
                    ) from None
        return kept


def _default_id(raw: RawRow, number: int) -> str:
    return f"row-{number}" if raw.default_id is None else raw.default_id


def _key(payload: tuple[Any, ...]) -> str:
    return sha256(canonical_json(payload)).hexdigest()
