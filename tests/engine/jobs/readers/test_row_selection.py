"""Samples: which numbers are chosen, and that it is the same ones every time."""

from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_engine.jobs.readers.row_selection import NumberedRow, sampled_numbers, select
from idefics2_engine.jobs.readers.source import RawRow


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.integers(-(2**63), 2**63 - 1))
def test_samples_are_sorted_numbers_of_rows(num_rows: int, size: int, seed: int) -> None:
    found = sampled_numbers(num_rows, size, seed)
    assert len(set(found)) == len(found) == min(size, num_rows)
    assert list(found) == sorted(found)
    assert all(0 <= number < num_rows for number in found)
    # A larger sample has the smaller one
    assert set(found) <= set(sampled_numbers(num_rows, size + 1, seed))


def test_samples_never_change() -> None:
    # A job that is resumed with another version must find its rows
    assert list(sampled_numbers(1000, 6, 0)) == [7, 40, 78, 174, 249, 548]
    assert list(sampled_numbers(1000, 6, -1)) != [7, 40, 78, 174, 249, 548]


def test_every_row_is_as_likely() -> None:
    counts = Counter(number for seed in range(800) for number in sampled_numbers(10, 3, seed))
    # Each is chosen 240 times on average, with a standard deviation of 13
    assert min(counts.values()) > 180
    assert max(counts.values()) < 300


def test_no_row_is_read_after_the_last_one() -> None:
    read = []

    def rows() -> Iterator[NumberedRow]:
        for number in range(100):
            read.append(number)
            yield NumberedRow(number, RawRow("", {}), "plain")

    numbers = sampled_numbers(100, 100, 0)[3:9]
    assert [row.number for row in select(rows(), numbers, 4)] == [3, 4, 5, 6]
    assert read == list(range(7))
    read.clear()
    assert [row.number for row in select(rows(), None, 2)] == [0, 1]
    assert read == [0, 1]
