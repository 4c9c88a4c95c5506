"""Constraints as grammars of llguidance, with the space that begins an answer."""

import json
import re
from typing import Any

from idefics2_engine.errors import SamplingError, short_repr
from idefics2_engine.structured.json_schema import enforceable
from idefics2_engine.structured.params import StructuredOutputsParams

# A regex for the space that the detokenizer strips from the begin of an answer
NO_SPACE, MAY_SPACE, MUST_SPACE = "", " ?", " "

_ANY_OBJECT = {"type": "object"}
# Strings, regexes and comments of Lark, in which the signs below mean nothing
_LARK_TEXTS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|\#[^\n]*')
# A control token by name or id, and grammars inside that would not be checked
_LARK_REFUSED = re.compile(r"<[^<>\n]*>|%(?:json|llguidance|lark)\b|\[[^\]\n]*\bmax_tokens\b")


def grammar_of(params: StructuredOutputsParams, space: str) -> str:
    """Return the grammar of ``params``, after the regex ``space``.

    Raises:
        SamplingError: A Lark grammar names control tokens or holds a grammar of another kind.
    """
    if params.is_json:
        schema = _ANY_OBJECT if params.json is None else json.loads(params.json)
        body = f"start: {_lark_space(space)}body\nbody: %json {_guided(schema, params)}"
        return json.dumps({"grammars": [{"lark_grammar": body}]})
    if params.grammar is not None:
        _check_lark(params.grammar)
        user = {"name": "user", "lark_grammar": params.grammar}
        start = {"lark_grammar": f"start: {_lark_space(space)}@user"}
        return json.dumps({"grammars": [start, user]})
    if params.choice is not None:
        regex = "|".join(map(_escape, params.choice))
    else:
        assert params.regex is not None
        regex = _without_anchors(params.regex)
    return _of_regex(f"{space}(?:{regex})")


def plain_regex(params: StructuredOutputsParams) -> str | None:
    """Return the grammar of a regex alone, which is refused if its brackets do not match."""
    if params.regex is None:
        return None
    return _of_regex(_without_anchors(params.regex))


def _guided(schema: dict[str, Any], params: StructuredOutputsParams) -> str:
    """Return the schema as text with llguidance's options in it."""
    options: dict[str, Any] = {
        "whitespace_flexible": not params.disable_any_whitespace,
        "lenient": False,
        "coerce_one_of": False,
    }
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return json.dumps({"x-guidance": options, **enforceable(schema)})


def _lark_space(space: str) -> str:
    return {NO_SPACE: "", MAY_SPACE: '" "? ', MUST_SPACE: '" " '}[space]


def _of_regex(regex: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def _escape(text: str) -> str:
    r"""Return a regex of ``text`` alone, with ``\x{...}`` for all but letters and digits."""
    return "".join(
        one if one.isascii() and one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text
    )


def _without_anchors(regex: str) -> str:
    """Return ``regex`` without ``^`` at its begin and ``$`` at its end, which say nothing there."""
    regex = regex.removeprefix("^")
    backslashes = len(regex[:-1]) - len(regex[:-1].rstrip("\\"))
    return regex[:-1] if regex.endswith("$") and backslashes % 2 == 0 else regex


def _check_lark(grammar: str) -> None:
    found = _LARK_REFUSED.search(_LARK_TEXTS.sub(" ", grammar))
    if found is not None:
        raise SamplingError(
            "grammar must be rules of text alone, without control tokens, max_tokens, %json and "
            f"%llguidance, got {short_repr(found[0])}"
        )
