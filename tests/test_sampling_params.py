"""Every bound of ``SamplingParams``, with an error that names parameter and value."""

import math
from dataclasses import asdict, fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from idefics2_engine.errors import SamplingError
from idefics2_engine.sampling_params import SamplingParams

HUGE = 10**5000  # more digits than Python writes
BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, 1e39, 10**400, HUGE, "1", None, True, 1j, [1.0]],
    "top_p": [0, -0.5, 1.01, math.nan, math.inf, -math.inf, None, False, np.float32("nan")],
    "top_k": [-2, 1.5, 2.0, 2**31, 2**63, HUGE, "5", True, None, math.nan, np.bool_(True)],
    "min_p": [-0.1, 1.1, math.nan, math.inf, None, "0", True],
    "repetition_penalty": [0, -1, 1e-40, 1e7, math.inf, math.nan, None, "1", True],
    "seed": [1.0, 2**63, -(2**63) - 1, HUGE, "0", True, math.nan, np.uint64(2**63)],
    "n": [0, -1, 1.0, 16385, 10**9, HUGE, None, True, "1"],
    "max_tokens": [0, -1, 2.0, True, "16", math.inf, -HUGE],
    "min_tokens": [-1, 1.0, None, True, "0", 17, HUGE],
    "stop": [[""], [1], ["a", None], "", None, b"a", [b"a"], {"a"}, {"a": 1}, 7, [["a"]]],
    "stop_token_ids": [
        [-1],
        [1.5],
        ["2"],
        [None],
        [True],
        [math.nan],
        None,
        7,
        "7",
        {7},
        np.array([7]),
        [-HUGE],
    ],
    "include_stop_str_in_output": [1, None, "true", np.bool_(True)],
    "ignore_eos": [0, None, "no"],
    "skip_special_tokens": ["yes", 1, None],
}
GOOD: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-9, 5e-324, 100, 1e6, np.float16(0.5), Fraction(1, 2)],
    "top_p": [1e-9, 5e-324, 1, np.float64(0.5)],
    "top_k": [-1, 0, 10**6, 2**31 - 1, np.int32(5)],
    "min_p": [0, 1, 0.5],
    "repetition_penalty": [0.5, 2, 1e-6, 1e6],
    "seed": [0, -5, 2**63 - 1, -(2**63), None, np.int64(3), np.uint64(3)],
    "n": [1, 8, 16384],
    "max_tokens": [16, 10**12, None],
    "min_tokens": [0, 16],
    "stop": [(), "x", ["x", "y"], ["\n", "<image>", "🦩"]],
    "stop_token_ids": [[], [0, 7], (7,), [np.int64(7)]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
}


def test_every_parameter_has_good_and_bad_values() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert BAD.keys() == GOOD.keys() == names


def shown(value: Any) -> str:
    """Return what an error must say of ``value``: the beginning of it is enough."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        value = value[0]  # an element of a list, or the whole
    if isinstance(value, int) and abs(value) == HUGE:
        return f"an integer of {HUGE.bit_length()} bits"
    if isinstance(value, np.ndarray):
        return "<ndarray>"
    return repr(value)[:20]


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs], ids=lambda x: shown(x)
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=rf"^{name} must "):
        SamplingParams(**{name: value})
    with pytest.raises(SamplingError, match=rf"^{name} must .* got ") as caught:
        SamplingParams.from_dict({name: value})
    assert shown(value) in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in GOOD.items() for v in vs], ids=lambda x: repr(x)
)
def test_in_range(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert params == SamplingParams.from_dict({name: value})
    kept = getattr(params, name)
    if name in ("stop", "stop_token_ids"):
        assert kept == ((value,) if isinstance(value, str) else tuple(value))
        assert {type(item) for item in kept} <= {str, int}
    else:
        assert kept == value
        assert type(kept) in (int, float, bool, type(None)), "a number of Python's own"


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(SamplingError, match="min_tokens must be at most max_tokens 4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(
        SamplingError, match="min_tokens must be at most max_tokens 16, got an integer"
    ):
        SamplingParams(min_tokens=HUGE)
    SamplingParams(min_tokens=5, max_tokens=None)
    SamplingParams(min_tokens=5, max_tokens=5)


def test_unknown_names_are_no_silent_options() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best_of": 2}, "'best_of' must be one of temperature, top_p, .*, got it with 2"),
        ({"temperature": 0, "Temperature": 1}, "'Temperature' must be one of .* with 1"),
        ({7: 8}, "7 must be one of .* with 8"),
        ({("a", HUGE): HUGE}, r"\('a', an integer of 16610 bits\) must be one of"),
        ({"x" * 1000: "y" * 1000}, "'xxx.* with 'yyy"),
        ([("temperature", 0)], r"sampling parameters must be a dict, got \[\('temperature', 0\)\]"),
        ("temperature=0", "sampling parameters must be a dict, got 'temperature=0'"),
        (None, "sampling parameters must be a dict, got None"),
    ],
)  # fmt: skip
def test_unknown_names_in_a_dict_are_bad_input(values: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        SamplingParams.from_dict(values)
    assert len(str(caught.value)) < 500


def test_a_dict_is_the_same_as_keywords() -> None:
    values: dict[str, Any] = {"temperature": 0.5, "stop": ["a"], "seed": 3, "max_tokens": None}
    assert SamplingParams.from_dict(values) == SamplingParams(**values)
    assert SamplingParams.from_dict({}) == SamplingParams()
    assert SamplingParams.from_dict(asdict(SamplingParams(top_k=3))) == SamplingParams(top_k=3)
