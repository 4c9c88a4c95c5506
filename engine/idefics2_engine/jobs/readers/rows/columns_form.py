"""Rows of columns: JSON objects with ``prompt`` and ``images``, and tables."""

from collections.abc import Mapping
from typing import Any

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.input_options import SAMPLING, InputOptions
from idefics2_engine.jobs.readers.json_line import parse_text
from idefics2_engine.jobs.readers.prompt_template import PromptTemplate
from idefics2_engine.jobs.readers.rows.row_content import RowContent, conversation, question
from idefics2_engine.jobs.readers.rows.row_images import RowImages


class ColumnsForm:
    """Reads rows by the names of their columns.

    Args:
        options: Names of the columns. A column that is named there must be in every row.
        template: The job's prompt. If ``None``, rows have their own.
        images: Reads images.
        is_table: Whether columns without a use are ignored, an image may not be null, and objects
            may be JSON text. Otherwise a key without a use is an error.
    """

    def __init__(
        self,
        options: InputOptions,
        template: PromptTemplate | None,
        images: RowImages,
        *,
        is_table: bool,
    ) -> None:
        self.id_column = options.id_column or "id"
        self.needs_id = options.id_column is not None
        self._template = template
        self._images = images
        self._is_table = is_table
        self._image_column = options.image_column
        self._prompt = options.prompt_column or "prompt"
        self._messages = options.messages_column or "messages"
        named = (options.image_column, options.prompt_column, options.messages_column)
        self._needed = [name for name in named if name is not None]
        self._known = {self.id_column, options.image_column or "images", SAMPLING, *options.keep}
        if template is None:
            self._known |= {self._prompt, self._messages}
        else:
            self._known |= template.columns

    def read(self, columns: Mapping[str, Any]) -> RowContent:
        """Return the content of a row.

        Raises:
            BadRowError: The row has another shape.
        """
        if not self._is_table and not columns.keys() <= self._known:
            self._check_known(columns)
        for name in self._needed:
            if name not in columns:
                raise BadRowError(
                    "schema", f"the row must have {short_repr(name)}, got no such column"
                )
        images, sampling = self._image_values(columns), self._object(columns, SAMPLING)
        if self._template is not None:
            return self._question(self._template.fill(columns), images, sampling)
        messages, prompt = self._object(columns, self._messages), columns.get(self._prompt)
        if messages is not None and prompt is None:
            return conversation(messages, images, self._images, sampling)
        if messages is not None:
            raise BadRowError(
                "schema",
                f"the row must have {short_repr(self._prompt)} or {short_repr(self._messages)}, "
                "got both",
            )
        if prompt is None:
            raise BadRowError(
                "schema",
                f"the row must have {short_repr(self._prompt)} or {short_repr(self._messages)}, "
                "got neither",
            )
        return self._question(prompt, images, sampling)

    def _question(self, text: Any, images: Any, sampling: Any) -> RowContent:
        return question(text, self._images.read_all(images, "images"), sampling)

    def _image_values(self, columns: Mapping[str, Any]) -> Any:
        name = self._image_column or "images"
        if self._is_table and self._image_column is None and "image" in columns:
            name = "image"
        value = columns.get(name)
        if self._is_table and value is None and name in columns:
            raise BadRowError("schema", f"{short_repr(name)} must be an image, got null")
        return value

    def _object(self, columns: Mapping[str, Any], name: str) -> Any:
        """Return a list or an object. All rows of a table have all keys, of which null is missing."""
        value = columns.get(name)
        if self._is_table and isinstance(value, str):
            return parse_text(value, short_repr(name))
        if self._is_table and isinstance(value, Mapping):
            return {key: one for key, one in value.items() if one is not None}
        return value

    def _check_known(self, columns: Mapping[str, Any]) -> None:
        for key, value in columns.items():
            if key not in self._known and value is not None:
                raise BadRowError(
                    "unknown_key",
                    f"the row must have keys with a use, got {short_repr(key)} "
                    "(--keep carries it to the output)",
                )
