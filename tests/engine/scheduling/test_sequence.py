"""Growing answers: stop rules, held-back text and seeds, on the host alone."""

from typing import cast

from idefics2_engine.prompts.detokenizer import Detokenizer
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Request, Sequence
from letters import Letters

END = 30


def make_sequence(prompt: int, max_tokens: int, **params: object) -> Sequence:
    request = Request(
        request_id="0",
        prompt="",
        prompt_token_ids=[5] * prompt,
        images=(),
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        seed=0,
        max_tokens=max_tokens,
    )
    sequence = Sequence(request, 0, frozenset({END}), cast(Detokenizer, Letters()))
    request.sequences.append(sequence)
    return sequence


def test_end_tokens_wait_for_min_tokens() -> None:
    sequence = make_sequence(3, 9, min_tokens=2)
    sequence.append(END)
    assert not sequence.output().finish_reason
    sequence.append(END)
    assert sequence.output().finish_reason == "stop"
    assert sequence.stop_reason is None
    assert sequence.output().token_ids == [END, END]


def test_last_token_gives_stop_or_length() -> None:
    for last, reason in ((END, "stop"), (7, "length")):
        sequence = make_sequence(3, 2)
        sequence.append(7)
        sequence.append(last)
        assert sequence.finish_reason == reason


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    sequence = make_sequence(3, 9, stop=["abd", "bce"])
    shown = []
    for letter in "abcabd":
        sequence.append(ord(letter) - ord("a"))
        shown.append(sequence.output().text)
    assert shown == ["", "", "a", "abc", "abc", "abc"]
    assert sequence.stop_reason == "abd"


def test_first_of_two_stop_strings_ends_the_answer() -> None:
    sequence = make_sequence(1, 9, stop=["cd", "bc"])
    for letter in "abcd":
        if not sequence.finish_reason:
            sequence.append(ord(letter) - ord("a"))
    assert (sequence.text, sequence.stop_reason) == ("a", "bc")


def test_stop_token_is_reported_as_the_reason() -> None:
    sequence = make_sequence(1, 9, stop_token_ids=[7])
    sequence.append(3)
    sequence.append(7)
    output = sequence.output()
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", 7, "d")


def test_seeds_of_the_answers_stay_in_64_bits() -> None:
    sequence = make_sequence(1, 1)
    sequence.request.seed = 2**63 - 1
    sequence.index = 1
    assert sequence.seed == -(2**63)
