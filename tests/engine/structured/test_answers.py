"""Every answer is valid, whatever the model wants, and nothing valid is lost."""

import json
import re
from decimal import Decimal
from typing import Any

import jsonschema
import pytest

from idefics2_engine.errors import SamplingError
from idefics2_engine.structured.json_schema import ENFORCED
from idefics2_engine.structured.params import StructuredOutputsParams
from structured_cases import KEYWORDS, OTHER_DIALECTS, REFUSED, REGEXES, SCHEMAS, Schema
from structured_draws import (
    accepts,
    can_be_completed,
    compiled,
    draw_answer,
    tokenizer,
)

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
SEEDS = 20


def validator(schema: Schema) -> Any:
    """Check formats, and decimal fractions exactly."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    return jsonschema.Draft202012Validator(exact, format_checker=FORMATS)


def parse(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_every_json_is_valid(index: int) -> None:
    schema = SCHEMAS[index]
    constraint, check = compiled(json=schema), validator(schema)
    wholes = 0
    for seed in range(SEEDS):
        answer = draw_answer(constraint, seed)
        if answer.is_whole:
            wholes += 1
            check.validate(parse(answer.text))
            assert answer.text == answer.text.strip(), "no blanks outside"
        else:
            assert can_be_completed(constraint, answer.tokens), answer.text
    assert wholes


def test_there_are_sixty_schemas_and_thirty_regexes() -> None:
    assert len(SCHEMAS) >= 60
    assert len(REGEXES) >= 30


def test_checker_knows_the_formats() -> None:
    # Without its extra, jsonschema skips formats in silence
    for name, wrong in (("date-time", "2024"), ("time", "1"), ("duration", "x"), ("uri", " ")):
        check = validator({"type": "string", "format": name})
        assert not check.is_valid(wrong), name
    for name in ("date", "hostname", "ipv4", "ipv6", "uuid", "email"):
        assert not validator({"format": name}).is_valid("-"), name


@pytest.mark.parametrize("regex", REGEXES)
def test_every_match_is_whole(regex: str) -> None:
    constraint = compiled(regex=regex)
    answers = [draw_answer(constraint, seed, 60) for seed in range(SEEDS)]
    for answer in answers:
        if answer.is_whole:
            assert re.fullmatch(regex, answer.text), answer
        else:
            assert can_be_completed(constraint, answer.tokens)
    assert any(answer.is_whole for answer in answers)


def test_every_choice_is_reached_and_no_other() -> None:
    choices = ["red", "red car", " blue", "(a|b)*", "a.c", "Zürich", "🦩", "\n", '"', "  two"]
    constraint = compiled(choice=choices)
    got = {draw_answer(constraint, seed).text for seed in range(400)}
    assert got == {*choices}


def test_grammar_is_followed() -> None:
    constraint = compiled(grammar='start: item ("," item)*\nitem: /[a-c]/ | "x" NUM\nNUM: /[0-9]+/')
    for seed in range(SEEDS):
        answer = draw_answer(constraint, seed, 40)
        if answer.is_whole:
            assert re.fullmatch(r"(?:[a-c]|x[0-9]+)(?:,(?:[a-c]|x[0-9]+))*", answer.text)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_keyword_is_enforced(keyword: str) -> None:
    case = KEYWORDS[keyword]
    constraint, check = compiled(json=case.schema), validator(case.schema)
    for text in case.valid:
        assert check.is_valid(parse(text)), text
        assert accepts(constraint, text), text
    for text in case.invalid:
        assert not check.is_valid(parse(text)), text
        assert not accepts(constraint, text), text


# Without these there is no such schema, or the invalid texts are those of a part of it
_PARTS = {"$schema", "$id", "$anchor", "$defs", "definitions"}


@pytest.mark.parametrize("keyword", [name for name in KEYWORDS if name not in _PARTS])
def test_invalid_texts_need_the_keyword(keyword: str) -> None:
    # If a keyword were accepted and not enforced, test_keyword_is_enforced would fail like this
    case = KEYWORDS[keyword]
    without = {
        name: value if name != "items" or keyword != "$ref" else {}
        for name, value in case.schema.items()
        if name != keyword
    }
    constraint = compiled(json=without)
    assert any(accepts(constraint, text) for text in case.invalid)


def test_cases_cover_every_keyword() -> None:
    assert KEYWORDS.keys() == ENFORCED
    assert not REFUSED.keys() & ENFORCED


@pytest.mark.parametrize("keyword", [*REFUSED, *OTHER_DIALECTS])
def test_keyword_is_refused_with_its_path(keyword: str) -> None:
    inner: Schema = {**REFUSED, **OTHER_DIALECTS}[keyword]
    named = rf"json: '{re.escape(keyword)}' at #/properties/a~1b cannot be enforced"
    schema = {"type": "object", "properties": {"a/b": {keyword: inner[keyword]}}}
    with pytest.raises(SamplingError, match=named):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "format": "color"}, "Unknown format: color"),
        ({"type": "string", "pattern": "(?=a)b"}, "json must be a constraint"),
        ({"type": "string", "pattern": r"\bfoo\b"}, "lookarounds not supported"),
        ({"enum": ["a"], "maxLength": 0}, "json must"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum"),
        ({"$ref": "#"}, "json must"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property"),
    ],
)  # fmt: skip
def test_schema_is_refused_when_it_is_compiled(schema: Schema, message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        compiled(json=schema)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "(?=a)b"}, {"regex": "("}, {"regex": "a)|(b"}, {"regex": r"a\b"},
        {"grammar": "rule: /a/"}, {"grammar": "start: missing"}, {"grammar": "{"},
        {"grammar": "start: <image>"}, {"grammar": 'start: "a" <[958]>'},
        {"grammar": 'start: %json {"uniqueItems": true}'}, {"grammar": "start: A\nA: /a/ & ~/a*/"},
    ],
    ids=lambda constraint: next(iter(constraint.values())),
)  # fmt: skip
def test_text_that_is_no_constraint_is_refused(constraint: dict[str, Any]) -> None:
    (kind,) = constraint
    with pytest.raises(SamplingError, match=f"^{kind} must "):
        compiled(**constraint)


def test_control_tokens_are_never_inside() -> None:
    # Their spelling may be: it has other tokens
    constraint = compiled(json={"type": "string", "pattern": "^<image>.*$"})
    control = tokenizer().control_ids
    answers = [draw_answer(constraint, seed, 40) for seed in range(SEEDS)]
    assert not any(control & {*answer.tokens} for answer in answers)
    assert any(answer.text.startswith('"<image>') for answer in answers)


def test_documents_of_a_schema_are_accepted() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {"enum": ["small", "large", "very large"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "price": {"type": "number"},
            "known": {"type": ["boolean", "null"]},
        },
        "required": ["name", "size", "known"],
        "additionalProperties": False,
    }
    constraint = compiled(json=schema)
    texts = ["", "a", "Zürich 🦩", 'a "b"', "line\nline", "\\", "<image>", "</s>", "\t", "}"]
    number = 0
    for text in texts:
        for size in ("small", "large", "very large"):
            for rest in ({}, {"tags": [text, "x"]}, {"price": -1.5e-7}, {"tags": [], "price": 12}):
                for known in (True, None):
                    document = {"name": text, "size": size, **rest, "known": known}
                    written = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
                    assert accepts(constraint, written), written
                    number += 1
    assert number >= 200


def test_blanks_are_as_asked() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    spaced, tight = '{ "a" : null }', '{"a":null}'
    assert not accepts(compiled(json=schema), spaced)
    free = compiled(json=schema, disable_any_whitespace=False)
    assert accepts(free, spaced)
    assert accepts(free, tight)
    one = compiled(json=schema, whitespace_pattern="[ ]?")
    assert accepts(one, spaced)
    assert not accepts(one, spaced.replace(" ", "  "))


@pytest.mark.parametrize("regex", ["a", " a", " ?a", "  a"])
@pytest.mark.parametrize("spaced", [True, False])
def test_text_has_the_spaces_of_the_constraint(regex: str, *, spaced: bool) -> None:
    # The detokenizer strips the space before a text
    constraint = compiled(regex=regex, spaced=spaced)
    texts = {draw_answer(constraint, seed).text for seed in range(30)}
    assert all(re.fullmatch(regex, text) for text in texts)
    assert len(texts) == (2 if "?" in regex else 1)
