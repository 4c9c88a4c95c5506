"""JSON schemas of draft 2020-12: what is enforced, and refusal of the rest by keyword and path.

llguidance ignores keywords that it does not know, and enforces some bounds only nearly. A schema is
therefore walked first. A keyword is enforced, or is an annotation that says nothing of the value,
or is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from idefics2_engine.errors import SamplingError, short_repr
from idefics2_engine.structured.formats import OWN_FORMATS

MOST_LEVELS = 64
"""Most levels of objects and lists in a schema."""
MOST_SCHEMAS = 2000
"""Most subschemas. The time to compile grows with their square: 0.5 s for so many properties."""

_SCHEMAS = ("2020-12/schema", "2019-09/schema", "draft-07/schema", "draft-07/schema#")
# llguidance reads numbers as fp64
_LARGEST = 2**53 - 1
_TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")

Check = Callable[[Any], str | None]
"""Returns what is wanted of a keyword's value, or ``None`` if that is what it is."""


def _kind(wanted: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value: None if fits(value) else wanted


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


_COUNT = _kind("an integer of at least 0", lambda v: type(v) is int and 0 <= v <= _LARGEST)
_NUMBER = _kind(f"a number of at most {_LARGEST} in size", _is_number)
_STRING = _kind("a string", lambda v: isinstance(v, str))
_ANYTHING = _kind("anything", lambda v: True)
_NAMES = _kind(
    "a list of strings, each once",
    lambda v: isinstance(v, list) and all(isinstance(s, str) for s in v) and len(set(v)) == len(v),
)
_TYPE = _kind(
    f"one of {', '.join(_TYPES)}, or a list of some",
    lambda v: (
        all(one in _TYPES for one in v) and len(v) > 0
        if isinstance(v, list)
        else isinstance(v, str) and v in _TYPES
    ),
)
_VALUES = _kind(
    f"a list of one or more values, whose integers are at most {_LARGEST} in size",
    lambda v: isinstance(v, list) and len(v) > 0 and all(map(_has_exact_numbers, v)),
)
_VALUE = _kind(
    f"a value whose integers are at most {_LARGEST} in size", lambda v: _has_exact_numbers(v)
)

ANNOTATIONS: Mapping[str, Check] = {
    "title": _STRING,
    "description": _STRING,
    "$comment": _STRING,
    "default": _ANYTHING,
    "examples": _ANYTHING,
    "deprecated": _ANYTHING,
    "readOnly": _ANYTHING,
    "writeOnly": _ANYTHING,
    # Pydantic writes it beside ``oneOf``
    "discriminator": _ANYTHING,
}
"""Keywords that say nothing about whether a value is valid."""

_IDENTIFIERS: Mapping[str, Check] = {
    "$schema": _kind(
        "that of draft 2020-12, 2019-09 or 07",
        lambda v: isinstance(v, str) and v.endswith(_SCHEMAS),
    ),
    "$id": _STRING,
    "$anchor": _STRING,
    "$ref": _kind(
        "within the schema, from '#' on", lambda v: isinstance(v, str) and v.startswith("#")
    ),
}
_ASSERTIONS: Mapping[str, Check] = {
    "type": _TYPE,
    "enum": _VALUES,
    "const": _VALUE,
    "multipleOf": _kind("a number above 0", lambda v: _is_number(v) and v > 0),
    "maximum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "minimum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "maxLength": _COUNT,
    "minLength": _COUNT,
    "pattern": _STRING,
    "format": _STRING,
    "maxItems": _COUNT,
    "minItems": _COUNT,
    "maxProperties": _COUNT,
    "minProperties": _COUNT,
    "required": _NAMES,
}
# Of the value of such a keyword: the one schema, those of a list, or those of a mapping
_ONE, _LIST, _MAPPING = "a schema", "a list of one or more schemas", "a mapping of schemas"
_APPLICATORS: Mapping[str, str] = {
    "additionalProperties": _ONE,
    "items": _ONE,
    "prefixItems": _LIST,
    "allOf": _LIST,
    "anyOf": _LIST,
    "oneOf": _LIST,
    "properties": _MAPPING,
    "patternProperties": _MAPPING,
    "$defs": _MAPPING,
    "definitions": _MAPPING,
}
ENFORCED: frozenset[str] = frozenset({*_IDENTIFIERS, *_ASSERTIONS, *_APPLICATORS})
"""Keywords that are enforced, or that name a part of the schema."""


def read_schema(schema: str | Mapping[str, Any], most_bytes: int) -> str:
    """Return the compact text of a schema, with the order of its keys.

    Raises:
        SamplingError: It is no JSON object, too long or too deep, or has a key twice.
    """
    if isinstance(schema, str):
        schema = _parse(schema)
    _check_levels(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        length = len(text.encode())
    except (TypeError, ValueError) as error:
        raise SamplingError(
            f"json must be a JSON schema, got a value that is not JSON: {error}"
        ) from None
    if length > most_bytes:
        raise SamplingError(f"json must be at most {most_bytes} bytes, got {length}")
    return text


def check_schema(schema: dict[str, Any]) -> None:
    """Refuse ``schema`` if a keyword in it is unknown, malformed or cannot be enforced.

    Raises:
        SamplingError: The message names the keyword and its path.
    """
    nodes = dict(_subschemas(schema, "#"))
    names = {
        f"#{node['$anchor']}" for node in nodes.values() if isinstance(node.get("$anchor"), str)
    }
    for path, node in nodes.items():
        for keyword, value in node.items():
            _check_keyword(path, keyword, value)
        if "$id" in node and path != "#":
            raise _error(path, "$id", "at the top alone", node["$id"])
        target = node.get("$ref", "#")
        if unquote(target) not in nodes and target not in names:
            raise _error(path, "$ref", "the path or anchor of a subschema", target)
        _check_counts(path, node)
    _check_bounds_near_zero(nodes)


def enforceable(schema: Any) -> Any:
    """Return ``schema`` for llguidance: without ``$schema``, and with our own formats."""
    if isinstance(schema, list):
        return [enforceable(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: value for key, value in schema.items() if key != "$schema"}
    for keyword, kind in _APPLICATORS.items():
        if keyword in changed:
            value = changed[keyword]
            changed[keyword] = (
                {name: enforceable(one) for name, one in value.items()}
                if kind is _MAPPING
                else enforceable(value)
            )
    pattern = OWN_FORMATS.get(changed.get("format", ""))
    if pattern is not None:
        del changed["format"]
        changed["allOf"] = [*changed.get("allOf", []), {"pattern": pattern}]
    return changed


def _subschemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``schema`` and all in it with their paths, without those that are true or false."""
    waiting, count = [(path, schema)], 0
    while waiting:
        path, schema = waiting.pop()
        count += 1
        if count > MOST_SCHEMAS:
            raise SamplingError(f"json must have at most {MOST_SCHEMAS} subschemas, got more")
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            keyword = path.rpartition("/")[2]
            raise _error(path.rpartition("/")[0], keyword, "a schema", schema)
        yield path, schema
        for keyword, kind in _APPLICATORS.items():
            if keyword not in schema:
                continue
            value = schema[keyword]
            if kind is _ONE:
                waiting.append((f"{path}/{keyword}", value))
                continue
            fits = (
                isinstance(value, dict) if kind is _MAPPING else isinstance(value, list) and value
            )
            if not fits:
                raise _error(path, keyword, kind, value)
            several = value.items() if kind is _MAPPING else enumerate(value)
            waiting += [(f"{path}/{keyword}/{_escape(name)}", one) for name, one in several]


def _check_keyword(path: str, keyword: str, value: Any) -> None:
    for checks in (_IDENTIFIERS, _ASSERTIONS, ANNOTATIONS):
        if keyword in checks:
            wanted = checks[keyword](value)
            if wanted is not None:
                raise _error(path, keyword, wanted, value)
            return
    if keyword not in _APPLICATORS:
        raise SamplingError(
            f"json: {keyword!r:.80} at {path:.200} cannot be enforced; remove it, or say it with "
            f"other keywords"
        )


def _check_counts(path: str, node: dict[str, Any]) -> None:
    """Refuse a number of properties that a repeated key would reach in the text alone."""
    is_free = node.get("additionalProperties", True) is not False or "patternProperties" in node
    if node.get("minProperties", 0) > 1 and is_free:
        raise _error(
            path,
            "minProperties",
            "at most 1, unless additionalProperties is false and there are no patternProperties "
            "(a key could be repeated)",
            node["minProperties"],
        )


def _check_bounds_near_zero(nodes: Mapping[str, dict[str, Any]]) -> None:
    """Refuse exclusive bounds of 0 whose other bound is nearer to 0 than 1.

    llguidance 1.9 accepts 0 there. Bounds of different subschemas may be merged.
    """
    merges = any(
        "allOf" in node or (len(node) > 1 and node.keys() & {"$ref", "anyOf", "oneOf"})
        for node in nodes.values()
    )
    for keyword, others, sign in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        near = {
            path
            for path, node in nodes.items()
            if any(0 < sign * node[other] < 1 for other in others if other in node)
        }
        for path, node in nodes.items():
            if node.get(keyword) == 0 and (path in near or (merges and near)):
                raise _error(path, keyword, "other than 0 beside a bound between it and 1", 0)


def _check_levels(schema: Any) -> None:
    level = [schema]
    for _ in range(MOST_LEVELS + 1):
        below = []
        for parent in level:
            if isinstance(parent, Mapping):
                for key in parent:
                    if not isinstance(key, str):
                        raise SamplingError(
                            f"json must have strings as keys, got {short_repr(key)}"
                        )
            children = parent.values() if isinstance(parent, Mapping) else parent
            below += [one for one in children if isinstance(one, Mapping | list | tuple)]
        if not below:
            return
        level = below
    raise SamplingError(f"json must have at most {MOST_LEVELS} levels, got more")


def _parse(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise SamplingError(f"json must have at most {MOST_LEVELS} levels, got more") from None
    except ValueError as error:
        raise SamplingError(
            f"json must be a JSON schema, got text that is not JSON: {error}"
        ) from None
    if not isinstance(parsed, dict):
        raise SamplingError(f"json must be a JSON object, got {short_repr(parsed)}")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {short_repr(twice)} is there twice")
    return read


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _has_exact_numbers(value: Any) -> bool:
    """Return whether fp64 has every integer in ``value``, and no number is infinite."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
        elif type(one) in (int, float) and not abs(one) <= _LARGEST:
            return False
    return True


def _escape(name: object) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")


def _error(path: str, keyword: str, wanted: str, got: object) -> SamplingError:
    return SamplingError(
        f"json: {keyword!r:.80} at {path:.200} must be {wanted}, got {short_repr(got)}"
    )
