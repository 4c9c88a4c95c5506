"""Constraints for tests of structured output: schemas, regexes, and cases of every keyword."""

from typing import Any, NamedTuple

Schema = dict[str, Any]


class KeywordCase(NamedTuple):
    """A schema that needs a keyword, with texts that satisfy it and texts that do not."""

    schema: Schema
    valid: tuple[str, ...]
    invalid: tuple[str, ...]


def closed(properties: Schema, *required: str, **more: Any) -> Schema:
    """Return an object's schema without further properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


STRING, INTEGER, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}
SHORT = {"type": "string", "maxLength": 3}

KEYWORDS: dict[str, KeywordCase] = {
    "$schema": KeywordCase(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"},
        ("null",), ("1", '""', "[]"),
    ),
    "$id": KeywordCase({"$id": "https://a.b/c", "type": "null"}, ("null",), ("1", '""', "[]")),
    "$anchor": KeywordCase(
        {"$defs": {"n": {"$anchor": "here", "type": "null"}}, "$ref": "#here"},
        ("null",), ("1", '""', "[]"),
    ),
    "$ref": KeywordCase(
        {"$defs": {"a b": SHORT}, "type": "array", "items": {"$ref": "#/$defs/a%20b"}},
        ("[]", '["a"]', '["abc","b"]'), ('["abcd"]', "[1]", '["a",null]'),
    ),
    "$defs": KeywordCase(
        {"$defs": {"n": NULL}, "$ref": "#/$defs/n"}, ("null",), ("1", '""', "[]")
    ),
    "definitions": KeywordCase(
        {"definitions": {"n": NULL}, "$ref": "#/definitions/n"}, ("null",), ("1", '""', "[]")
    ),
    "type": KeywordCase(
        {"type": ["integer", "boolean"]}, ("1", "true", "-20"), ("1.5", "null", '"1"')
    ),
    "enum": KeywordCase(
        {"enum": [1, "a", None, {"b": [2]}]}, ("1", '"a"', '{"b":[2]}'), ("2", '"b"', '{"b":[3]}')
    ),
    "const": KeywordCase({"const": {"a": [1]}}, ('{"a":[1]}',), ("{}", '{"a":[2]}', "1")),
    "multipleOf": KeywordCase(
        {"type": "integer", "multipleOf": 7}, ("0", "14", "-700"), ("1", "15", "-8")
    ),
    "maximum": KeywordCase(
        {"type": "number", "maximum": 3.5}, ("3.5", "-1e9"[:2], "3.49"), ("3.51", "4", "30")
    ),
    "exclusiveMaximum": KeywordCase(
        {"type": "integer", "exclusiveMaximum": 10}, ("9", "-10", "0"), ("10", "11", "100")
    ),
    "minimum": KeywordCase(
        {"type": "integer", "minimum": -5}, ("-5", "0", "99"), ("-6", "-10", "-50")
    ),
    "exclusiveMinimum": KeywordCase(
        {"type": "number", "exclusiveMinimum": 0}, ("0.1", "1", "20"), ("0", "-1", "-0.5")
    ),
    "maxLength": KeywordCase(
        {"type": "string", "maxLength": 2}, ('""', '"ab"', '"é🦩"'), ('"abc"', '"abcd"', '"éàü"')
    ),
    "minLength": KeywordCase(
        {"type": "string", "minLength": 2}, ('"ab"', '"abc"', '"🦩é"'), ('""', '"a"', '"🦩"')
    ),
    "pattern": KeywordCase(
        {"type": "string", "pattern": "^a|b$"}, ('"a"', '"ax"', '"xb"'), ('"x"', '"bx"', '""')
    ),
    "format": KeywordCase(
        {"type": "string", "format": "date"},
        ('"2024-02-29"', '"0001-01-01"', '"1999-12-31"'),
        ('"2023-02-29"', '"2024-13-01"', '"24-01-01"'),
    ),
    "maxItems": KeywordCase(
        {"type": "array", "items": NULL, "maxItems": 1},
        ("[]", "[null]"), ("[null,null]", "[null,null,null]", "[1]"),
    ),
    "minItems": KeywordCase(
        {"type": "array", "items": NULL, "minItems": 2},
        ("[null,null]", "[null,null,null]"), ("[]", "[null]", "[1,2]"),
    ),
    "items": KeywordCase(
        {"type": "array", "items": INTEGER}, ("[]", "[1]", "[1,-2]"), ("[null]", '["a"]', "[1,{}]")
    ),
    "prefixItems": KeywordCase(
        {"type": "array", "prefixItems": [INTEGER, STRING]},
        ("[]", '[1,"a"]', '[1,"a",null]'), ('["a"]', "[1,2]", "[null]"),
    ),
    "properties": KeywordCase(
        {"type": "object", "properties": {"a": INTEGER}},
        ('{"a":1}', "{}", '{"a":1,"b":null}'), ('{"a":null}', '{"a":"1"}', '{"a":1.5}'),
    ),
    "patternProperties": KeywordCase(
        {"type": "object", "patternProperties": {"^n": NULL}, "additionalProperties": INTEGER},
        ('{"n":null}', '{"x":1}', '{"no":null,"x":1}'), ('{"n":1}', '{"x":null}', '{"n":"a"}'),
    ),
    "additionalProperties": KeywordCase(
        {"type": "object", "properties": {"a": NULL}, "additionalProperties": INTEGER},
        ("{}", '{"b":1}', '{"a":null,"b":1}'), ('{"b":null}', '{"b":"x"}', '{"a":null,"b":[]}'),
    ),
    "required": KeywordCase(
        {"type": "object", "properties": {"a": NULL, "b": NULL}, "required": ["b"]},
        ('{"b":null}', '{"a":null,"b":null}'), ("{}", '{"a":null}', '{"c":null}'),
    ),
    "maxProperties": KeywordCase(
        {"type": "object", "additionalProperties": NULL, "maxProperties": 1},
        ("{}", '{"a":null}'), ('{"a":null,"b":null}', '{"a":1}', '{"a":null,"b":null,"c":null}'),
    ),
    "minProperties": KeywordCase(
        {"type": "object", "additionalProperties": NULL, "minProperties": 1},
        ('{"a":null}', '{"a":null,"b":null}'), ("{}", '{"a":1}', "null"),
    ),
    "allOf": KeywordCase(
        {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}]},
        ('"ab"', '"abc"'), ('"a"', '"abcd"', "1"),
    ),
    "anyOf": KeywordCase(
        {"anyOf": [SHORT, INTEGER]}, ('"abc"', "1", '""'), ('"abcd"', "null", "1.5")
    ),
    "oneOf": KeywordCase(
        {"oneOf": [SHORT, INTEGER]}, ('"abc"', "1", '""'), ('"abcd"', "null", "1.5")
    ),
}  # fmt: skip
"""A case of every keyword that is enforced or names a part of the schema."""

REFUSED: dict[str, Schema] = {
    "$dynamicRef": {"$dynamicRef": "#a"},
    "$dynamicAnchor": {"$dynamicAnchor": "a"},
    "$vocabulary": {"$vocabulary": {}},
    "not": {"not": NULL},
    "if": {"if": NULL, "then": NULL},
    "then": {"then": NULL},
    "else": {"else": NULL},
    "dependentSchemas": {"dependentSchemas": {"a": {}}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "contains": {"type": "array", "contains": NULL},
    "minContains": {"type": "array", "minContains": 1},
    "maxContains": {"type": "array", "maxContains": 1},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "a"}},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "contentEncoding": {"type": "string", "contentEncoding": "base64"},
    "contentMediaType": {"type": "string", "contentMediaType": "text/html"},
    "contentSchema": {"type": "string", "contentSchema": {}},
}
"""Keywords of draft 2020-12 that are refused, each in a schema."""

OTHER_DIALECTS: dict[str, Schema] = {
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "additionalItems": {"type": "array", "additionalItems": False},
    "nullable": {"type": "string", "nullable": True},
    "minimun": {"type": "integer", "minimun": 3},
    "x-guidance": {"type": "integer", "x-guidance": {"lenient": True}},
}
"""Keywords of other dialects and of none, which are refused as well."""

_LEAVES: list[Schema] = [
    *(case.schema for case in KEYWORDS.values() if "$ref" not in case.schema),
    *({"type": "string", "format": name} for name in (
        "time", "date-time", "duration", "hostname", "ipv4", "ipv6", "uuid",
    )),
    {"type": "boolean"},
    {"type": "integer", "minimum": 1, "maximum": 12},
    {"type": "number", "minimum": -0.25, "maximum": 0.75},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 9},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
    {"type": "string", "pattern": '^"\\\\?$'},
    {"type": "string", "pattern": "^.{0,4}$"},
    {"type": ["string", "null"], "maxLength": 5},
    {"enum": ['"', "\\", "\n", "é", "🦩", ""]},
    {"allOf": [{"type": "integer", "multipleOf": 2}, {"multipleOf": 3, "minimum": 0}]},
    {"type": "string", "anyOf": [{"minLength": 3}, {"pattern": "^a"}], "maxLength": 4},
]  # fmt: skip
_WHOLE: list[Schema] = [
    closed({"a": SHORT, "b": {"type": "integer", "minimum": 0, "maximum": 99}}, "a", "b"),
    closed({"a": SHORT, "b": NULL}),
    closed({'"\n\\': NULL, "é": NULL}, '"\n\\'),
    closed({"kind": {"const": "x"}, "at": {"type": "string", "format": "date-time"}}, "kind"),
    closed({"list": {"type": "array", "items": SHORT, "maxItems": 3}}, "list"),
    closed({"sub": {"$ref": "#"}}),
    {"$defs": {"n": closed({"next": {"anyOf": [NULL, {"$ref": "#/$defs/n"}]}}, "next")},
     "$ref": "#/$defs/n"},
    {"type": "array", "prefixItems": [INTEGER, SHORT], "items": False, "minItems": 2},
    {"type": "array", "items": closed({"x": {"type": "integer"}}, "x"), "maxItems": 2},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"oneOf": [closed({"k": {"const": "a"}, "v": INTEGER}, "k", "v"),
               closed({"k": {"const": "b"}, "w": SHORT}, "k", "w")]},
    {"allOf": [closed({"a": INTEGER}, "a"), {"required": ["a"]}]},
    {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], **closed({"a": NULL, "b": NULL})},
    {"type": "object"},
    {},
]  # fmt: skip
SCHEMAS: list[Schema] = [*_LEAVES, *_WHOLE]
"""Schemas for answers of a model that wants anything."""

REGEXES = (
    "a", "a|b", "^a$", "^a|b$", "ab?c*d+", "(?:ab){2,3}", "[a-z]{1,4}", "[^a]b", "[0-9]{2}",
    "[0-9a-z]\\n[A-Z]", "[A-Z][a-z]{0,5}\\.", "a{0,3}", "(a+)+b", "x(y|z)?", "[0-9]{4}-[0-9]{2}",
    "\\$[0-9]{1,3}\\.[0-9]{2}", "(yes|no)", " ?a", " a", "  b", "\\(a\\)", "\\[x\\]", "[é🦩]{1,2}",
    "\"[^\"]{0,3}\"", "a\\.b", "[-+]?[0-9]{1,3}", "(red|green|blue)( and (red|green|blue))?",
    "[ab]{3}", "\\x41b", "q.q",
)  # fmt: skip
"""Regexes in the syntax that Python and Rust share."""
