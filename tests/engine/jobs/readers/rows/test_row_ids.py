"""Identifiers: repeated ones are found exactly, and the others that they get are unique."""

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_engine.jobs.readers.rows import row_ids
from idefics2_engine.jobs.readers.rows.row_ids import (
    IdHashes,
    IdSuffixes,
    PlacedId,
    RepeatedId,
    find_repeated,
)

IDS = st.lists(
    st.sampled_from(["a", "b", "a-2", "a-2-2", "a-3", "1", 1, 2, -1, "", "\ud800", "row-0"]),
    max_size=12,
)


def hashed(ids: list[str | int]) -> IdHashes:
    hashes = IdHashes()
    for one in ids:
        hashes.add(one)
    return hashes


def placed(ids: list[str | int]) -> list[PlacedId]:
    return [PlacedId(one, f"line {number}") for number, one in enumerate(ids)]


@settings(max_examples=60, deadline=None)
@given(IDS)
def test_repeated_identifiers_are_found_with_both_places(ids: list[str | int]) -> None:
    wanted = [
        RepeatedId(one, f"line {ids.index(one)}", f"line {number}")
        for number, one in enumerate(ids)
        if one in ids[:number]
    ]
    found = find_repeated(hashed(ids), placed(ids), most=3)
    assert found.num_rows == len(wanted)
    assert found.first == tuple(wanted[:3])


@settings(max_examples=60, deadline=None)
@given(IDS)
def test_suffixes_make_identifiers_unique(ids: list[str | int]) -> None:
    suffixes = IdSuffixes(hashed(ids))
    made = [suffixes.unique(one) for one in ids]
    assert len(set(made)) == len(made)
    seen: set[str | int] = set()
    for old, new in zip(ids, made, strict=True):
        # The first one keeps its identifier, and so does one that is there once
        if old in seen:
            assert str(new).startswith(f"{old}-")
        else:
            assert new == old
        seen.add(old)


def test_suffixes_are_numbers_that_are_free() -> None:
    ids: list[str | int] = ["a", "a", "a-2", "a", 5, 5]
    suffixes = IdSuffixes(hashed(ids))
    made = [suffixes.unique(one) for one in ids]
    assert made == ["a", "a-3", "a-2", "a-4", 5, "5-2"]


def test_equal_hashes_of_different_identifiers_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Zero:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(row_ids, "blake2b", Zero)
    ids: list[str | int] = ["a", "b", "c", "b"]
    found = find_repeated(hashed(ids), placed(ids), most=20)
    assert found == (1, (RepeatedId("b", "line 1", "line 3"),))
    suffixes = IdSuffixes(hashed(ids[:3]))
    assert [suffixes.unique(one) for one in ids[:3]] == ["a", "b", "c"]


def test_of_many_repeated_identifiers_the_first_are_shown_and_all_are_counted() -> None:
    ids: list[str | int] = [*range(3000), *range(2999, -1, -1)]
    found = find_repeated(hashed(ids), placed(ids), most=20)
    assert found.num_rows == 3000
    assert [one.id for one in found.first] == list(range(2999, 2979, -1))
    assert found.first[0] == RepeatedId(2999, "line 2999", "line 3000")


def test_rows_are_read_again_only_if_hashes_repeat() -> None:
    def rows() -> Iterator[PlacedId]:
        raise AssertionError
        yield

    ids: list[str | int] = list(range(1000))
    assert find_repeated(hashed(ids), rows(), most=20) == (0, ())


def test_a_row_costs_a_few_bytes() -> None:
    ids: list[str | int] = [f"an identifier of some length, {number}" for number in range(20_000)]
    tracemalloc.start()
    try:
        hashes = IdHashes()
        for one in ids:
            hashes.add(one)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # An array grows by an eighth when it is full
    assert held < len(ids) * 10
