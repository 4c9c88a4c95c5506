"""A harness's arguments of a generation as sampling parameters."""

from typing import Any

import pytest

from idefics2_engine import SamplingParams
from idefics2_engine.errors import SamplingError
from idefics2_engine.evaluation.generation_arguments import ArgumentReader


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, {}),
        ({"temperature": 0, "top_p": None, "num_beams": 1}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 3}, {}),
        ({"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.7, "top_p": 0.5}),
        ({"temperature": 0.7, "top_p": 0}, {"temperature": 0.7}),
        ({"do_sample": True, "top_k": 3, "seed": 4}, {"temperature": 1.0, "top_k": 3, "seed": 4}),
        ({"do_sample": True, "temperature": 0.0}, {}),
        ({"max_new_tokens": 8}, {"max_tokens": 8}),
        ({"max_new_tokens": 8, "max_gen_toks": 4}, {"max_tokens": 4}),
        ({"max_tokens": 8}, {"max_tokens": 8}),
        ({"until": "\n"}, {"stop": ["\n"]}),
        ({"until": ["", "\n\n", "Q:"]}, {"stop": ["Q:"]}),
        ({"until": None}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
    ids=lambda value: str(value).replace("\n", "/"),
)
def test_arguments_are_read(
    arguments: dict[str, Any], wanted: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    reader = ArgumentReader(100, ignored_stops=["\n\n"])
    plain = {"temperature": 0.0, "max_tokens": 100, "stop": []}
    assert reader.params(arguments) == SamplingParams(**{**plain, **wanted})
    assert not caplog.records


def test_each_argument_without_effect_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = ArgumentReader(100)
    for length in (8, 9):
        reader.params({"num_beams": 3, "image_aspect_ratio": "pad", "max_new_tokens": length})
    assert sorted(record.getMessage() for record in caplog.records) == [
        "generation argument image_aspect_ratio='pad' has no effect",
        "generation argument num_beams=3 has no effect",
    ]


def test_equal_arguments_share_an_object() -> None:
    reader = ArgumentReader(100)
    assert reader.params({"until": ["a"]}) is reader.params({"until": ["a"]})


def test_a_value_out_of_range_is_an_error() -> None:
    with pytest.raises(SamplingError, match="temperature must be"):
        ArgumentReader(100).params({"do_sample": True, "temperature": -1.0})
