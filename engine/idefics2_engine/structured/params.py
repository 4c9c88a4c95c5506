"""The constraint of an answer as a caller gives it, with vLLM's names; needs no llguidance."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from idefics2_engine.errors import SamplingError, short_repr
from idefics2_engine.field_checks import MismatchError, OrNone, check_fields, checked, flag
from idefics2_engine.structured.json_schema import check_schema, read_schema

MOST_BYTES = 256 * 1024
"""Most bytes of a schema, a regex or a grammar in UTF-8."""
MOST_CHOICES = 10_000

# They may be combined with no other
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_QUANTIFIERS = re.compile(r"\{\d*,?\d*\}")
# Blanks of JSON, as characters or escapes, and what combines them in a regex
_BLANKS = re.compile(r"(?:[ \t\n\r]|\\[tnr]|\\x(?:20|09|0[aAdD])|\(\?:|[\[\]()|?*+])*")


def _text(value: object) -> str:
    """Accept a text that is not empty, at most 256 KiB long and writable in UTF-8."""
    wanted = f"a text of 1 to {MOST_BYTES} bytes, writable in UTF-8"
    if not isinstance(value, str) or not value:
        raise MismatchError(wanted, short_repr(value))
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise MismatchError(wanted, short_repr(value)) from None
    if length > MOST_BYTES:
        raise MismatchError(wanted, f"{length} bytes")
    return value


def _schema(value: object) -> str:
    """Accept a JSON schema as a mapping, as text, or as a class of pydantic; return its text."""
    if is_model(value):
        value = value.model_json_schema()  # type: ignore[attr-defined]
    if not isinstance(value, str | Mapping):
        raise MismatchError("a mapping, JSON text or a pydantic model class", short_repr(value))
    return read_schema(_text(value) if isinstance(value, str) else value, MOST_BYTES)


def _choices(value: object) -> tuple[str, ...]:
    """Accept 1 to 10,000 texts that are not empty and occur once."""
    wanted = f"a list of 1 to {MOST_CHOICES} strings"
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_CHOICES:
        number = f"{len(value)} values" if isinstance(value, list | tuple) else short_repr(value)
        raise MismatchError(wanted, number)
    seen: set[str] = set()
    for one in value:
        try:
            _text(one)
        except MismatchError as found:
            raise MismatchError(f"{wanted}, each {found.wanted}", found.got) from None
        if one in seen:
            raise MismatchError(f"{wanted}, each once", f"{short_repr(one)} twice")
        seen.add(one)
    return tuple(value)


def _blanks(value: object) -> str:
    """Accept a regex of which every match is blanks of JSON."""
    pattern = _text(value)
    if not _BLANKS.fullmatch(_QUANTIFIERS.sub("", pattern)):
        wanted = r"a regex of blanks, '\t', '\n', '\r', groups, classes and quantifiers alone"
        raise MismatchError(wanted, short_repr(value))
    return pattern


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must be: exactly one of the first five, and options of JSON.

    An answer that ends with "stop" satisfies it. A constraint that cannot be enforced whole is
    refused.

    Attributes:
        json: A JSON schema as a mapping or text, or a class of pydantic. It is kept as text.
        regex: A regex in the syntax of Rust's crate ``regex``, which the whole answer matches.
        choice: The possible answers.
        grammar: A Lark grammar, as llguidance reads it, whose first rule is ``start``.
        json_object: Whether the answer is any JSON object.
        disable_any_whitespace: For JSON, whether there are no blanks between its tokens. By default
            that is so unless there is a ``whitespace_pattern``.
        whitespace_pattern: For JSON, a regex of the blanks that may be there.

    Raises:
        SamplingError: None or several of the five are given, or one cannot be enforced.
    """

    json: Any = checked(OrNone(_schema), None)
    regex: str | None = checked(OrNone(_text), None)
    choice: Sequence[str] | None = checked(OrNone(_choices), None)
    grammar: str | None = checked(OrNone(_text), None)
    json_object: bool = checked(flag, False)
    disable_any_whitespace: bool | None = checked(OrNone(flag), None)
    whitespace_pattern: str | None = checked(OrNone(_blanks), None)

    def __post_init__(self) -> None:
        """Check every field and make the schema a text."""
        object.__setattr__(self, "_model", self.json if is_model(self.json) else None)
        check_fields(self, SamplingError)
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            several = f"got {' and '.join(given) or 'none'}"
            raise SamplingError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}, {several}"
            )
        if self.json is not None:
            check_schema(json.loads(self.json))
        self._check_blanks()

    def _check_blanks(self) -> None:
        """Resolve the options of JSON, and refuse them elsewhere."""
        strict, pattern = self.disable_any_whitespace, self.whitespace_pattern
        if not self.is_json:
            for name, value in (
                ("disable_any_whitespace", strict),
                ("whitespace_pattern", pattern),
            ):
                if value not in (None, False):
                    raise SamplingError(
                        f"{name} must be absent without json or json_object, got {short_repr(value)}"
                    )
        elif strict and pattern is not None:
            raise SamplingError(
                "whitespace_pattern must be absent where disable_any_whitespace is True, "
                f"got {short_repr(pattern)}"
            )
        if strict is None:
            object.__setattr__(self, "disable_any_whitespace", self.is_json and pattern is None)

    @property
    def model(self) -> Any:
        """The class of pydantic that ``json`` was, ``None`` if it was none."""
        return self.__dict__["_model"]

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON."""
        return self.json is not None or self.json_object

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StructuredOutputsParams":
        """Build from parsed JSON, where an unknown name is invalid input.

        Raises:
            SamplingError: A name is unknown, or the constraint is refused.
        """
        known = [one.name for one in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise SamplingError(
                    f"structured_outputs: {short_repr(name)} must be one of {', '.join(known)}, "
                    f"got it with {short_repr(value)}"
                )
        return cls(**values)


def is_model(value: object) -> bool:
    """Return whether ``value`` is a class that gives and validates JSON as pydantic's do."""
    return isinstance(value, type) and all(
        callable(getattr(value, name, None))
        for name in ("model_json_schema", "model_validate_json")
    )


def read_structured_outputs(value: object) -> StructuredOutputsParams:
    """Accept ``StructuredOutputsParams``, or a mapping of its fields."""
    if isinstance(value, StructuredOutputsParams):
        return value
    if isinstance(value, Mapping):
        return StructuredOutputsParams.from_dict(value)
    raise MismatchError("StructuredOutputsParams or a mapping of its fields", short_repr(value))
