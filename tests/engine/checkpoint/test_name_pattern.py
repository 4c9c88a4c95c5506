"""Patterns of module names: they match like PEFT's, and look at each character once."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from idefics2_engine.checkpoint.name_pattern import NamePattern
from idefics2_engine.errors import ConfigError

MODULE = "model.text_model.layers.11.self_attn.q_proj"
atoms = st.tuples(
    st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "_", "-", "1", r"\-"]),
    st.sampled_from(["", "", "", "*", "+"]),
).map("".join)
patterns = st.builds(
    lambda head, atoms, tail: head + "".join(atoms) + tail,
    st.sampled_from(["", "^"]),
    st.lists(atoms, min_size=1, max_size=6),
    st.sampled_from(["", "$"]),
).filter(lambda pattern: pattern.count("*") + pattern.count("+") <= 2)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(pattern=patterns, name=st.text("ab._-1", min_size=1, max_size=9))
def test_patterns_match_as_in_peft(pattern: str, name: str) -> None:
    fits = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert NamePattern(pattern, "alpha_pattern").fits(name) == fits


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "self_attn.q_proj", MODULE, f"^{MODULE}$", "proj", "k_proj", ".*q_proj", ".*_proj",
        r"layers\.\d+\.self_attn\..*", r"layers\.\d\.self_attn.q_proj", "^text_model.*", "^model.*q_proj",
        r".*text_model.*_proj", "layers.1", ".", ".*", "x*", r"\w+", "q.proj", "11.*q_proj",
    ],
)  # fmt: skip
def test_modules_are_found_as_in_peft(pattern: str) -> None:
    found = get_pattern_key([pattern], MODULE) == pattern
    assert NamePattern(pattern, "rank_pattern").fits(MODULE) == found


class Counted(str):
    """A name that counts how often its characters are read."""

    seen = 0

    def __iter__(self) -> Iterator[str]:
        for character in super().__iter__():
            self.seen += 1
            yield character


@pytest.mark.parametrize("pattern", [".*.*b", ".*a.*b", r"\w+\w+x", "a*a*b", ".*.+"])
def test_each_character_is_read_once(pattern: str) -> None:
    name = Counted("a." * 4000 + "c")
    assert NamePattern(pattern, "alpha_pattern").fits(name) == pattern.endswith(".+")
    assert name.seen == len(name)


@pytest.mark.parametrize(
    "pattern",
    ["", "^", "$", "*", "+a", "a**", "a*+", "(a+)+", "a|b", "[ab]", "a{9}", "a?", r"\b", r"\1", "a^b", "a$b", "a\\", "é",
     "a*b*c*", "x" * 201, "\n"],
)  # fmt: skip
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern: keys must be names of modules"):
        NamePattern(pattern, "rank_pattern")
