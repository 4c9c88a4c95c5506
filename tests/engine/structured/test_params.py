"""What ``StructuredOutputsParams`` accepts, keeps and refuses."""

import json
import pickle
from dataclasses import asdict, replace
from functools import reduce
from typing import Any

import pytest
from pydantic import BaseModel

from idefics2_engine import SamplingParams, StructuredOutputsParams
from idefics2_engine.errors import SamplingError
from structured_cases import NULL, closed


class Point(BaseModel):
    x: int
    label: str | None = None


def deep(levels: int) -> dict[str, Any]:
    return reduce(lambda inner, _: {"items": inner}, range(levels), {})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "must have exactly one of json, regex, choice, grammar, json_object, got none"),
    ({"regex": "a", "choice": ["b"]}, "must have exactly one of .* got regex and choice"),
    ({"json_object": False}, "got none"),
    ({"json_object": 1}, "json_object must be True or False, got 1"),
    ({"json": 7}, "json must be a mapping, JSON text or a pydantic model class, got 7"),
    ({"json": "{"}, "json must be a JSON schema, got text that is not JSON: Expecting"),
    ({"json": "[]"}, r"json must be a JSON object, got \[\]"),
    ({"json": '{"type": "null", "type": "null"}'}, "the key 'type' is there twice"),
    ({"json": '{"const": NaN}'}, "NaN is no number"),
    ({"json": {"const": {1, 2}}}, "json must be a JSON schema, got a value that is not JSON"),
    ({"json": {"const": float("inf")}}, "a value that is not JSON"),
    ({"json": {"properties": {1: {}}}}, "json must have strings as keys, got 1"),
    ({"json": deep(65)}, "json must have at most 64 levels, got more"),
    ({"json": "[" * 5000}, "json must have at most 64 levels|not JSON"),
    ({"json": '{"items":' * 3000 + "{}" + "}" * 3000}, "json must have at most 64 levels"),
    ({"json": {"description": "x" * 262_144}}, "json must be at most 262144 bytes, got 2621"),
    ({"json": {"enum": []}}, "json: 'enum' at # must be a list of one or more values"),
    ({"json": {"enum": [2**53]}}, "whose integers are at most 9007199254740991"),
    ({"json": {"const": [{"a": 2**60}]}}, "'const' at # must be a value whose integers"),
    ({"json": {"maximum": True}}, "'maximum' at # must be a number of at most"),
    ({"json": {"exclusiveMaximum": True, "maximum": 3}}, "'exclusiveMaximum' at # must be"),
    ({"json": {"minLength": 1.5}}, "'minLength' at # must be an integer of at least 0, got 1.5"),
    ({"json": {"type": "text"}}, "'type' at # must be one of null, boolean"),
    ({"json": {"required": ["a", "a"]}}, "'required' at # must be a list of strings, each once"),
    ({"json": {"items": [{}]}}, "'items' at # must be a schema, got"),
    ({"json": {"allOf": []}}, "'allOf' at # must be a list of one or more schemas"),
    ({"json": {"properties": {"a": 3}}}, "'a' at #/properties must be a schema, got 3"),
    ({"json": {"$ref": "https://a.b/c"}}, "'[$]ref' at # must be within the schema"),
    ({"json": {"$ref": "file:///etc/passwd"}}, "'[$]ref' at # must be within the schema"),
    ({"json": {"$ref": "#/$defs/none"}}, "'[$]ref' at # must be the path or anchor"),
    ({"json": {"examples": [{}], "items": {"$ref": "#/examples/0"}}}, "must be the path or anch"),
    ({"json": {"$schema": "http://json-schema.org/draft-04/schema#"}}, "'[$]schema' at # must"),
    ({"json": {"minProperties": 2}}, "'minProperties' at # must be at most 1, unless"),
    ({"json": {"exclusiveMinimum": 0, "maximum": 0.5}}, "'exclusiveMinimum' at # must be other"),
    (
        {"json": {"allOf": [{"exclusiveMaximum": 0}, {"minimum": -0.5}]}},
        "'exclusiveMaximum' at #/allOf/0 must be other than 0",
    ),
    (
        {"json": {"properties": {f"p{i}": {} for i in range(10_000)}}},
        "json must have at most 2000 subschemas",
    ),
    ({"regex": ""}, "regex must be a text of 1 to 262144 bytes"),
    ({"regex": "a" * 262_145}, "regex must be a text of .*, got 262145 bytes"),
    ({"regex": "\ud800"}, "regex must be a text"),
    ({"grammar": 3}, "grammar must be a text"),
    ({"choice": []}, "choice must be a list of 1 to 10000 strings, got 0 values"),
    ({"choice": "cat"}, "choice must be a list of 1 to 10000 strings, got 'cat'"),
    ({"choice": ["a", ""]}, "choice must be a list of .* each a text of 1 .* got ''"),
    ({"choice": ["a", "b", "a"]}, "choice must be a list of .*, each once, got 'a' twice"),
    ({"choice": [str(i) for i in range(10_001)]}, "choice must be .*, got 10001 values"),
    ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace must be absent"),
    ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern must be absent without"),
    (
        {"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "},
        "whitespace_pattern must be absent where disable_any_whitespace is True",
    ),
    ({"json": {}, "whitespace_pattern": "[ x]"}, "whitespace_pattern must be a regex of blanks"),
    ({"json": {}, "whitespace_pattern": "."}, "whitespace_pattern must be a regex of blanks"),
    ({"json": {}, "whitespace_pattern": "[^ ]"}, "whitespace_pattern must be a regex of blanks"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_constraint_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        StructuredOutputsParams(**values)
    assert len(str(caught.value)) < 500
    with pytest.raises(SamplingError, match=message):
        SamplingParams(structured_outputs=values)


@pytest.mark.parametrize("pattern", [" ", "[ \\n]?", "[\\x20\\x0A]{0,3}", "(?:\\t|\\r)*", "\n"])
def test_patterns_of_blanks_are_accepted(pattern: str) -> None:
    params = StructuredOutputsParams(json={}, whitespace_pattern=pattern)
    assert params.disable_any_whitespace is False


def test_schema_is_kept_as_text_in_its_order() -> None:
    schema = closed({"b": NULL, "a": {"enum": ["é"]}}, "b")
    params = StructuredOutputsParams(json=schema)
    assert params.json == json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    assert StructuredOutputsParams(json=json.dumps(schema, indent=2)) == params
    schema["properties"].clear()
    assert json.loads(params.json)["properties"], "a copy"


def test_class_of_pydantic_is_its_schema() -> None:
    params = StructuredOutputsParams(json=Point)
    assert json.loads(params.json) == Point.model_json_schema()
    assert params.model is Point
    assert params == StructuredOutputsParams(json=Point.model_json_schema())


def test_blanks_are_off_by_default_for_json_alone() -> None:
    assert StructuredOutputsParams(json={}).disable_any_whitespace is True
    assert StructuredOutputsParams(json_object=True).disable_any_whitespace is True
    assert StructuredOutputsParams(regex="a").disable_any_whitespace is False


@pytest.mark.parametrize(
    "values",
    [
        {"json": Point}, {"json_object": True}, {"choice": ["a", "b"]}, {"regex": "a"},
        {"grammar": "start: /a/"}, {"json": {}, "whitespace_pattern": " "},
    ],
    ids=lambda values: "-".join(values),
)  # fmt: skip
def test_parameters_are_hashable_and_survive_copies(values: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**values), max_tokens=9)
    assert hash(params) == hash(replace(params))
    assert pickle.loads(pickle.dumps(params)) == params
    assert SamplingParams.from_dict(asdict(params)) == params
    constraint = params.constraint
    assert constraint is not None
    assert constraint.kind == next(iter(values))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(SamplingError, match="structured_outputs: 'guided_json' must be one of"):
        SamplingParams(structured_outputs={"guided_json": {}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["."]), ("stop_token_ids", [5]), ("ignore_eos", True),
        ("include_stop_str_in_output", True),
    ],
)  # fmt: skip
def test_other_ends_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"^{name} must be absent with structured_outputs"):
        SamplingParams(structured_outputs={"choice": ["a"]}, **{name: value})
