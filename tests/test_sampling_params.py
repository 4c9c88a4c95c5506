"""Every bound of ``SamplingParams``, with an error that names parameter and value."""

import math
from typing import Any

import pytest

from idefics2_engine.errors import SamplingError
from idefics2_engine.sampling_params import SamplingParams

BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, 1e39, 10**400, "1", None, True],
    "top_p": [0, -0.5, 1.01, math.nan, None],
    "top_k": [-2, 1.5, 2**63, "5", True],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0, -1, 1e-40, math.inf, math.nan],
    "seed": [1.0, 2**63, -(2**63) - 1, "0", True],
    "n": [0, -1, 1.0],
    "max_tokens": [0, -1, 2.0],
    "min_tokens": [-1, 1.0, None],
    "stop": [[""], [1], ["a", None], "", None],
    "stop_token_ids": [[-1], [1.5], ["2"], None, 7],
    "include_stop_str_in_output": [1, None],
    "ignore_eos": [0],
    "skip_special_tokens": ["yes"],
}
GOOD: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-9, 100],
    "top_p": [1e-9, 1],
    "top_k": [-1, 0, 10**6],
    "min_p": [0, 1],
    "repetition_penalty": [0.5, 2],
    "seed": [0, -5, 2**63 - 1, None],
    "n": [1, 8],
    "max_tokens": [1, None],
    "min_tokens": [0, 16],
    "stop": [(), "x", ["x", "y"]],
    "stop_token_ids": [[], [0, 7]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs], ids=lambda x: repr(x)
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=rf"^{name} must"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in GOOD.items() for v in vs], ids=lambda x: repr(x)
)
def test_in_range(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(SamplingError, match="min_tokens must be at most max_tokens 4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=5, max_tokens=None)


def test_unknown_names_are_no_silent_options() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
