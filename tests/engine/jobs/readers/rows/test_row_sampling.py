"""Sampling parameters of rows: the job's, changed by the row's, checked, and built once."""

import weakref
from typing import Any

import pytest

from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.rows.row_sampling import RowSampling
from idefics2_engine.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.5, max_tokens=9, stop=("x",), logit_bias={3: 1.0})


def test_rows_change_the_parameters_of_the_job() -> None:
    sampling = RowSampling(DEFAULTS)
    assert sampling.merge(None) is DEFAULTS
    assert sampling.merge({}) is DEFAULTS
    merged = sampling.merge({"max_tokens": None, "seed": 3, "stop": ["y"]})
    assert merged == SamplingParams(
        temperature=0.5, max_tokens=None, stop=("y",), seed=3, logit_bias={3: 1.0}
    )


def test_equal_parameters_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = RowSampling(DEFAULTS)
    built = []
    check = SamplingParams.__post_init__

    def count(params: SamplingParams) -> None:
        built.append(params)
        check(params)

    monkeypatch.setattr(SamplingParams, "__post_init__", count)
    first = sampling.merge({"seed": 1, "n": 2})
    assert all(sampling.merge({"seed": 1, "n": 2}) is first for _ in range(10))
    assert len(built) == 1
    for _ in range(3):
        with pytest.raises(BadRowError, match="n must be an integer"):
            sampling.merge({"n": 0})
    assert len(built) == 2


def test_long_parameters_are_not_kept() -> None:
    sampling = RowSampling(DEFAULTS)
    # Weak references show what is kept
    long, short = (sampling.merge({"stop": ["x" * length]}) for length in (10_000, 10))
    kept = [weakref.ref(one) for one in (long, short)]
    del long, short
    assert [one() is not None for one in kept] == [False, True]


def test_values_that_python_calls_equal_are_not_confused() -> None:
    sampling = RowSampling(DEFAULTS)
    assert sampling.merge({"n": 1}).n == 1
    assert sampling.merge({"temperature": 0.0}).temperature == 0
    for value in (True, 1.0):
        with pytest.raises(BadRowError, match="n must be an integer"):
            sampling.merge({"n": value})
    with pytest.raises(BadRowError, match="temperature must be a number"):
        sampling.merge({"temperature": False})


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"temperature": -1}, "sampling", "temperature must be a number in [0, 1e+06], got -1"),
        ({"max_tokens": "9"}, "sampling", "max_tokens must be an integer of at least 1, got '9'"),
        ({"max_tokens": 2, "min_tokens": 3}, "sampling", "min_tokens must be at most max_tokens 2"),
        ({"best_of": 2}, "sampling", "'best_of' must be one of temperature, "),
        ({"seed": b"x"}, "sampling", "sampling must be JSON data"),
        ({"seed": {1: 2}}, "sampling", "sampling must be JSON data"),
        ({"top_p": float("nan")}, "sampling", "sampling must be JSON data"),
        ([1], "schema", "sampling must be an object, got a list"),
        ("greedy", "schema", "sampling must be an object, got a string"),
        (0, "schema", "sampling must be an object, got a number"),
    ],
)
def test_bad_parameters_are_errors(given: Any, code: str, message: str) -> None:
    with pytest.raises(BadRowError) as caught:
        RowSampling(DEFAULTS).merge(given)
    error = caught.value.row_error
    assert (error.code, error.stage) == (code, "prepare" if code == "sampling" else "parse")
    assert error.message.startswith(message)
    assert len(error.message) <= 500
