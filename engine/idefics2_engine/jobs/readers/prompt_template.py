"""Prompts with names of columns in braces."""

import string
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.json_line import json_type

_FILLED_IN = (str, int, float, Decimal, date)


class PromptTemplate:
    """Text as for ``str.format_map``, of which only plain names are allowed.

    Args:
        text: The template. A brace that is meant is written twice.

    Attributes:
        text: The template.
        columns: Names in braces.

    Raises:
        ConfigError: Braces have something else than the name of a column.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"prompt: a brace must be written twice, or have the name of a column, got {error}"
            ) from None
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion or set(name) & set(".[]{}")):
                raise ConfigError(
                    "prompt: braces must have the name of a column and nothing else, got "
                    f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
                )
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.columns = frozenset(name for _, name in self._parts if name is not None)

    def fill(self, columns: Mapping[str, Any]) -> str:
        """Return the text with the values of ``columns``.

        Raises:
            BadRowError: A column is missing, or is neither text nor a number.
        """
        pieces = []
        for literal, name in self._parts:
            pieces.append(literal)
            if name is not None:
                if name not in columns:
                    raise BadRowError("template", f"the prompt needs the column {short_repr(name)}")
                value = columns[name]
                if not isinstance(value, _FILLED_IN):
                    raise BadRowError(
                        "template",
                        f"column {short_repr(name)} of the prompt must be text or a number, "
                        f"got {json_type(value)}",
                    )
                pieces.append(str(value))
        return "".join(pieces)
