"""Every bound of ``SamplingParams``, with an error that names parameter and value."""

import math
from dataclasses import asdict, fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from idefics2_engine.errors import SamplingError
from idefics2_engine.sampling_params import SamplingParams

# Python refuses to print a number of so many digits
HUGE = 10**5000
BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, 1e39, 10**400, HUGE, "1", None, True, 1j, [1.0]],
    "top_p": [0, -0.5, 1.01, math.nan, math.inf, -math.inf, None, False, np.float32("nan")],
    "top_k": [-2, 1.5, 2.0, 2**31, 2**63, HUGE, "5", True, None, math.nan, np.bool_(True)],
    "min_p": [-0.1, 1.1, math.nan, math.inf, None, "0", True],
    "repetition_penalty": [0, -1, 1e-40, 1e7, math.inf, math.nan, None, "1", True],
    "structured_outputs": [7, "json", ["a"], True],
    "seed": [1.0, 2**63, -(2**63) - 1, HUGE, "0", True, math.nan, np.uint64(2**63)],
    "n": [0, -1, 1.0, 16385, 10**9, HUGE, None, True, "1"],
    "max_tokens": [0, -1, 2.0, True, "16", math.inf, -HUGE],
    "min_tokens": [-1, 1.0, None, True, "0", 17, HUGE],
    "stop": [[""], [1], ["a", None], "", None, b"a", [b"a"], {"a"}, {"a": 1}, 7, [["a"]], "\ud800"],
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
    "presence_penalty": [-2.1, 2.001, math.nan, math.inf, None, "1", True],
    "frequency_penalty": [-2.001, 3, math.nan, -math.inf, None, [1], False],
    "logit_bias": [
        {-1: 0},
        {1.0: 0},
        {True: 0},
        {None: 0},
        {"x": 0},
        {"-1": 0},
        {" 1": 0},
        {"\u0661": 0},
        {1: 100.5},
        {1: -101},
        {1: math.nan},
        {1: math.inf},
        {1: None},
        {1: "1"},
        {1: True},
        {1: HUGE},
        {1: 0, "1": 0},
        [(1, 0)],
        7,
        "7",
    ],
    "allowed_token_ids": [
        [],
        (),
        [-1],
        [1.0],
        ["2"],
        [None],
        [True],
        7,
        "7",
        {7},
        [-HUGE],
        np.array([7]),
    ],
    "bad_words": [[""], ["  "], [1], ["a", None], "", " ", None, {"a"}, b"a", ["\ud800"]],
    "logprobs": [-2, 1.5, 2.0, True, "5", math.nan, -HUGE, [1]],
    "prompt_logprobs": [-2, 0.0, False, "all", math.inf, np.bool_(True)],
    "prompt_logprobs_start": [-1, 0.0, False, None, "1"],
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
    "structured_outputs": [None],
    "seed": [0, -5, 2**63 - 1, -(2**63), None, np.int64(3), np.uint64(3)],
    "n": [1, 8, 16384],
    "max_tokens": [16, 10**12, None],
    "min_tokens": [0, 16],
    "stop": [(), "x", ["x", "y"], ["\n", "<image>", "🦩"]],
    "stop_token_ids": [[], [0, 7], (7,), [np.int64(7)]],
    "presence_penalty": [-2, 2, 0.5, np.float32(1.5)],
    "frequency_penalty": [-2.0, 2, Fraction(1, 4)],
    "logit_bias": [None, {}, {0: 100, 7: -100.0}, {10**9: 0.5}],
    "allowed_token_ids": [None, [0], (3, 3), [np.int64(7), 2**40]],
    "bad_words": [(), "red", ["a"], ("a b", " c", "🦩", "\n")],
    "logprobs": [None, 0, -1, 20, 10**6, np.int32(3)],
    "prompt_logprobs": [None, 0, -1, 20],
    # Other places need prompt_logprobs
    "prompt_logprobs_start": [0, np.int32(0)],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
}


def test_tables_cover_every_parameter() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert BAD.keys() == GOOD.keys() == names


def expected_text(value: Any) -> str:
    """Return the beginning of the text that an error must have for ``value``."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        # The error names an element of a list, or the whole list
        value = value[0]
    if isinstance(value, dict) and len(value) == 1 and [*value] != [1]:
        # The error names the key
        value = next(iter(value))
    elif isinstance(value, dict) and len(value) == 1:
        value = value[1]
    elif value == {1: 0, "1": 0}:
        value = "1"
    if isinstance(value, int) and abs(value) == HUGE:
        return f"an integer of {HUGE.bit_length()} bits"
    if isinstance(value, np.ndarray):
        return "<ndarray>"
    return repr(value)[:20]


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs], ids=lambda x: expected_text(x)
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=rf"^{name} must "):
        SamplingParams(**{name: value})
    with pytest.raises(SamplingError, match=rf"^{name} must .* got ") as caught:
        SamplingParams.from_dict({name: value})
    assert expected_text(value) in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in GOOD.items() for v in vs], ids=lambda x: repr(x)
)
def test_values_in_range_are_kept(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert params == SamplingParams.from_dict({name: value})
    kept = getattr(params, name)
    if name in ("logit_bias", "allowed_token_ids") and value is not None:
        numbers = [*kept, *(kept.values() if name == "logit_bias" else ())]
        assert kept == (value if name == "logit_bias" else tuple(value))
        assert {type(number) for number in numbers} <= {int, float}, "numbers of Python's own"
    elif name in ("stop", "stop_token_ids", "bad_words"):
        assert kept == ((value,) if isinstance(value, str) else tuple(value))
        assert {type(item) for item in kept} <= {str, int}
    else:
        assert kept == value
        assert type(kept) in (int, float, bool, type(None)), "a number of Python's own"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bad_words": 7}, "bad_words must be a list of words, got 7"),
        ({"bad_words": {"red"}}, "bad_words must be a list of words, got {'red'}"),
        (
            {"bad_words": ["red", " "]},
            "bad_words must be a list of words, each more than spaces and writable in UTF-8, got ' ' in ['red', ' ']",
        ),
        (
            {"stop": ["\n"] * 9 + [10]},
            "stop must be a list of strings, each not empty and writable in UTF-8, got 10 in ['\\n', ",
        ),
        ({"allowed_token_ids": []}, "allowed_token_ids must be a list of one or more token ids, got []"),
        (
            {"stop_token_ids": [3, 2.0]},
            "stop_token_ids must be a list of token ids, each an integer of at least 0, got 2.0 in [3, 2.0]",
        ),
        ({"logit_bias": {7: 101}}, "logit_bias must be a mapping from token ids to numbers in [-100, 100], got 101 for 7"),
    ],
)  # fmt: skip
def test_error_distinguishes_type_and_elements(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(message)


def test_bias_may_have_text_keys_as_in_json() -> None:
    bias: Any = {"7": 1, 8: 3}
    assert SamplingParams(logit_bias=bias).logit_bias == {7: 1.0, 8: 3.0}
    bias = {"7": 1, "007": 2}
    with pytest.raises(
        SamplingError, match="logit_bias must be a mapping with each token id once, got '007' twice"
    ):
        SamplingParams(logit_bias=bias)


def test_parameters_are_hashable_and_copy_the_bias() -> None:
    bias = {7: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[7] = 2.0
    assert params.logit_bias == {7: 1.0}
    assert hash(params) == hash(SamplingParams(logit_bias={7: 1.0}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop_token_ids": [1, 10]}, "stop_token_ids must be below the vocabulary's 10, got 10"),
        ({"allowed_token_ids": [10, 3]}, "allowed_token_ids must be below .* 10, got 10"),
        ({"logit_bias": {3: 1, HUGE: 1}}, "logit_bias must be below .* 10, got an integer of"),
        ({"logprobs": 11}, "logprobs must be at most the vocabulary's 10, got 11"),
        (
            {"prompt_logprobs": 2**70},
            "prompt_logprobs must be at most the vocabulary's 10, got 118",
        ),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**values).check_vocabulary(10)


def test_whole_vocabulary_may_be_named() -> None:
    everything = list(range(10))
    SamplingParams(
        stop_token_ids=everything,
        allowed_token_ids=everything,
        logit_bias=dict.fromkeys(everything, 1.0),
        logprobs=10,
        prompt_logprobs=-1,
    ).check_vocabulary(10)


def test_min_tokens_above_max_tokens_are_refused() -> None:
    with pytest.raises(SamplingError, match="min_tokens must be at most max_tokens 4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(
        SamplingError, match="min_tokens must be at most max_tokens 16, got an integer"
    ):
        SamplingParams(min_tokens=HUGE)
    SamplingParams(min_tokens=5, max_tokens=None)
    SamplingParams(min_tokens=5, max_tokens=5)


def test_a_first_position_of_no_log_probabilities_is_refused() -> None:
    message = "prompt_logprobs_start must be 0 without prompt_logprobs, got 3"
    with pytest.raises(SamplingError, match=message):
        SamplingParams(prompt_logprobs_start=3)
    SamplingParams(prompt_logprobs_start=3, prompt_logprobs=0)


def test_unknown_keyword_is_a_type_error() -> None:
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
def test_unknown_names_in_a_dict_are_refused(values: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        SamplingParams.from_dict(values)
    assert len(str(caught.value)) < 500


def test_dict_equals_keywords() -> None:
    values: dict[str, Any] = {"temperature": 0.5, "stop": ["a"], "seed": 3, "max_tokens": None}
    assert SamplingParams.from_dict(values) == SamplingParams(**values)
    assert SamplingParams.from_dict({}) == SamplingParams()
    assert SamplingParams.from_dict(asdict(SamplingParams(top_k=3))) == SamplingParams(top_k=3)
