"""Fingerprints: equal parts have equal ones, and a table names every part that differs."""

import hashlib

import pytest

from idefics2_engine.jobs.store.canonical_json import canonical_json, encode_row
from idefics2_engine.jobs.store.fingerprint import (
    Difference,
    difference_table,
    differences,
    fingerprint,
)

PARTS = {"seed": 0, "dtype": "bf16", "sampling": {"top_p": 0.9, "stop": ["é", "\ud800"]}}


def test_fingerprint_is_the_hash_of_sorted_json() -> None:
    text = r'{"dtype":"bf16","sampling":{"stop":["\u00e9","\ud800"],"top_p":0.9},"seed":0}'
    assert fingerprint(PARTS) == hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint(dict(reversed(PARTS.items()))) == fingerprint(PARTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, [{None: 1}]])
def test_values_that_json_would_change_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"must be a string|not JSON compliant"):
        fingerprint({"part": value})
    with pytest.raises(ValueError, match=r"must be a string|not JSON compliant"):
        encode_row({"part": value})
    with pytest.raises(TypeError):
        fingerprint({"part": object()})


@pytest.mark.parametrize("pair", [(1, 1.0), (1, True), (0.0, -0.0), (None, "null"), ({}, [])])
def test_values_of_other_types_differ(pair: tuple[object, object]) -> None:
    one, two = ({"part": value} for value in pair)
    assert fingerprint(one) != fingerprint(two)
    assert [found.name for found in differences(one, two)] == ["part"]


def test_differences_are_named_down_to_the_value() -> None:
    now = {"seed": 0, "dtype": "fp32", "sampling": {"stop": ["é"], "top_k": 5}, "new": {}}
    assert differences(PARTS, now) == [
        Difference("dtype", '"bf16"', '"fp32"'),
        Difference("new", "(absent)", "{}"),
        Difference("sampling.stop", r'["\u00e9","\ud800"]', r'["\u00e9"]'),
        Difference("sampling.top_k", "(absent)", "5"),
        Difference("sampling.top_p", "0.9", "(absent)"),
    ]
    assert differences(PARTS, PARTS) == []
    assert differences({}, {}) == []


def test_long_values_that_differ_at_the_end_are_shown_differently() -> None:
    (found,) = differences({"template": "x" * 1000 + "a"}, {"template": "x" * 1000 + "b"})
    assert found.journal != found.now
    assert len(found.journal) == len(found.now) < 41


def test_table_is_aligned() -> None:
    table = difference_table(
        [Difference("seed", "0", "(absent)"), Difference("a.b", '"long"', "1")]
    )
    assert table == (
        "name  journal  now\n"
        "seed  0        (absent)\n"
        'a.b   "long"   1'
    )  # fmt: skip


def test_row_is_one_line_of_utf8_in_the_order_of_its_keys() -> None:
    row: dict[str, object] = {"b": "é\u2028\n\ud800", "a": 0.1 + 0.2}
    assert encode_row(row) == b'{"b":"\xc3\xa9\xe2\x80\xa8\\n\\ud800","a":0.30000000000000004}'
    assert canonical_json(row) == rb'{"a":0.30000000000000004,"b":"\u00e9\u2028\n\ud800"}'
