"""Values in error messages: always short, and without memory addresses."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from idefics2_engine.errors import PromptError, short_repr
from idefics2_engine.prompts.messages import read_messages

HUGE = 10**5000
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, "None"),
        (True, "True"),
        (-1.5, "-1.5"),
        (float("nan"), "nan"),
        (1j, "1j"),
        (np.float32(0.5), "np.float32(0.5)"),
        (np.bool_(True), "np.True_"),
        ("a", "'a'"),
        (b"a" * 10**6, "b'aaaa"),
        ("a" * 10**6, "'aaaa"),
        ({"a": [1, (2,)]}, "{'a': [1, (2,)]}"),
        (HUGE, "an integer of 16610 bits"),
        ([HUGE], "[an integer of 16610 bits]"),
        (Fraction(1, HUGE), "<Fraction>"),
        ([[]] * 10**6, "[[], [], "),
        (DEEP, "[[[[...]]]]"),
        (Image.new("RGB", (2, 2)), "<Image>"),
        ({"image": Image.new("RGB", (2, 2))}, "{'image': <Image>}"),
        (object(), "<object>"),
        (np.zeros((9, 9, 3)), "<ndarray>"),
    ],
    ids=short_repr,
)
def test_short_repr_of_values(value: Any, wanted: str) -> None:
    got = short_repr(value)
    assert got.startswith(wanted)
    assert len(got) <= 80
    assert " at 0x" not in got


@pytest.mark.parametrize(
    "value", [HUGE, DEEP, {"type": HUGE}, {"type": "image", "image": None}], ids=short_repr
)
def test_any_invalid_message_is_a_prompt_error(value: Any) -> None:
    for messages in (value, [value], [{"role": value, "content": "a"}]):
        with pytest.raises(PromptError):
            read_messages(messages)
    for content in (value, [value], [{"type": "text", "text": value}]):
        with pytest.raises(PromptError):
            read_messages([{"role": "user", "content": content}])
