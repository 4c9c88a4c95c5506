"""Hostile constraints: each is refused or compiled, and changes nothing beside it."""

import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import pytest

from idefics2_engine.errors import SamplingError, StructuredOutputError
from idefics2_engine.structured.check import check_constraint
from idefics2_engine.structured.compiler import Compiler
from idefics2_engine.structured.limits import within
from idefics2_engine.structured.params import StructuredOutputsParams
from structured_cases import closed
from structured_draws import ENDS, VOCAB, accepts, compiled, draw_answer, tokenizer

HOSTILE: list[dict[str, Any]] = [
    {"regex": "(a+)+b"},
    {"regex": "(a{1,9999}){1,9999}"},
    {"regex": "|".join(f"w{i:x}" for i in range(30_000))},
    {"regex": "(((a?){20}){20}){20}"},
    {"regex": ".*" * 500},
    {"choice": [f"choice {i}" for i in range(10_000)]},
    {"json": {"type": "string", "minLength": 100_000}},
    {"json": {"type": "array", "minItems": 100_000}},
    {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {"json": closed({f"p{i}": {"type": "integer"} for i in range(500)})},
    {"grammar": "start: start start | /a/"},
    {"grammar": "start: " + "(" * 200 + "/a/" + ")" * 200},
    {"grammar": "{"},
]


@pytest.mark.parametrize("constraint", HOSTILE, ids=lambda value: str(value)[:30])
def test_hostile_constraint_ends(constraint: dict[str, Any]) -> None:
    # It is refused, or the request fails, or it is answered
    with suppress(SamplingError, StructuredOutputError):
        draw_answer(compiled(**constraint), seed=0, most=30)
    assert accepts(compiled(choice=["yes", "no"]), "yes"), "others are compiled as before"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_constraints_take_little_memory() -> None:
    program = (
        "import resource, sys; sys.path[:0] = sys.argv[1:]\n"
        "from structured_draws import compiled, draw_answer\n"
        "from test_limits import HOSTILE\n"
        "from idefics2_engine.errors import Idefics2Error\n"
        "draw_answer(compiled(choice=['a']), 0)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for one in HOSTILE:\n"
        "    try: draw_answer(compiled(**one), 0, 30)\n"
        "    except Idefics2Error: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    paths = [entry for entry in sys.path if entry] + [__file__.rpartition("/")[0]]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 500 * 1024


def test_work_that_takes_too_long_is_dropped() -> None:
    may_end = threading.Event()
    try:
        with pytest.raises(SamplingError, match="regex must compile within 0 s of CPU time"):
            within(0.0, may_end.wait, "regex")
    finally:
        may_end.set()
    assert within(60.0, lambda: 7, "regex") == 7


def test_result_of_a_deadline_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def late(_seconds: float, _function: object, name: str) -> None:
        calls.append(name)
        raise SamplingError(f"{name} must compile")

    monkeypatch.setattr("idefics2_engine.structured.compiler.within", late)
    compiler = Compiler(tokenizer(), VOCAB, ENDS)
    for _ in range(3):
        with pytest.raises(SamplingError):
            compiler.constraint(StructuredOutputsParams(regex="a"), spaced=True)
    assert len(calls) == 1


def test_memory_of_many_constraints_is_bounded() -> None:
    compiler = Compiler(tokenizer(), VOCAB, ENDS)
    first = compiler.constraint(StructuredOutputsParams(regex="a{0}b"), spaced=True)
    same = compiler.constraint(StructuredOutputsParams(regex="a{0}b"), spaced=True)
    assert same is first
    for i in range(300):
        compiler.constraint(StructuredOutputsParams(regex=f"a{{{i}}}c"), spaced=True)
    again = compiler.constraint(StructuredOutputsParams(regex="a{0}b"), spaced=True)
    assert again is not first, "the oldest was dropped"


@pytest.mark.parametrize(
    "values",
    [{"regex": "(?=a)"}, {"regex": "a)|(b"}, {"json": {"format": "color"}}, {"grammar": "{"}],
)
def test_check_without_a_tokenizer_refuses(values: dict[str, Any]) -> None:
    kind = next(iter(values))
    params = StructuredOutputsParams(**values)
    for _ in range(2):
        with pytest.raises(SamplingError, match=f"^{kind} must be a constraint"):
            check_constraint(params)


def test_check_without_a_tokenizer_accepts() -> None:
    accepted: list[dict[str, Any]] = [
        {"regex": "^a$"},
        {"choice": ["a"]},
        {"json_object": True},
        {"json": {}},
    ]
    for values in accepted:
        check_constraint(StructuredOutputsParams(**values))
