"""A line of JSON as an object, or the reason why it is none."""

import json
import math
import re
from typing import Any, NoReturn

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.readers.bad_row import BadRowError

MOST_LEVELS = 64
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the object of a line in UTF-8.

    Raises:
        BadRowError: The line is not UTF-8, not strict JSON, deeper than 64 levels, or no object. Or
            an object has a key twice.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            "encoding", f"line must be UTF-8, got another byte after {error.start} bytes"
        ) from None
    parsed = parse_text(text, "line")
    if not isinstance(parsed, dict):
        raise BadRowError("schema", f"line must be a JSON object, got {json_type(parsed)}")
    return parsed


def parse_text(text: str, name: str) -> Any:
    """Return the JSON value in ``text``, which errors call ``name``.

    Raises:
        BadRowError: The text is not strict JSON or too deep, or an object has a key twice.
    """
    # The parser's own limit depends on how deep the caller's stack is
    if text.count("[") + text.count("{") > MOST_LEVELS and _depth(text) > MOST_LEVELS:
        raise BadRowError("json", f"{name} must have at most {MOST_LEVELS} levels, got more")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRowError(
            "json", f"{name} must be JSON, got: {_reason(error)} at character {error.pos + 1}"
        ) from None
    except ValueError:
        # Python limits the digits of an integer
        raise BadRowError("json", f"{name} must be JSON, got a number that is too long") from None


def json_type(value: object) -> str:
    """Return JSON's name of the type of ``value``, or Python's."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at").lower()


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        depth += _STEPS.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadRowError("duplicate_key", f"the key {short_repr(key)} must be there once")
            seen.add(key)
    return read


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadRowError("json", f"numbers must be finite, got {text[:40]}")
    return number


def _constant(name: str) -> NoReturn:
    raise BadRowError("json", f"numbers must be finite, got {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_finite, parse_constant=_constant
)
