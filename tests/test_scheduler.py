"""Pages and scheduling, on the host alone: a fuzz with full accounting after every step."""

import random
from typing import cast

import pytest

from idefics2_engine.detokenizer import Detokenizer
from idefics2_engine.pages import PageAllocator
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduler import Scheduler
from idefics2_engine.sequence import Request, Sequence

END = 30


class Letters:
    """Stands for a detokenizer: every token is one letter."""

    def add(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def flush(self) -> str:
        return ""


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


def test_fuzz() -> None:
    rng = random.Random(0)
    for _ in range(40):
        pages = PageAllocator(num_pages=rng.randint(4, 40), page_size=rng.choice([1, 4, 16]))
        capacity = pages.num_pages * pages.page_size
        scheduler = Scheduler(pages, rng.randint(1, 6), rng.choice([1, 20, 1000]))
        admitted: list[Sequence] = []
        added: list[Sequence] = []
        for _ in range(500):
            if rng.random() < 0.3:
                prompt = rng.randint(1, capacity - 1)
                sequence = make_sequence(prompt, rng.randint(1, min(20, capacity - prompt)))
                scheduler.add(sequence)
                added.append(sequence)
            if rng.random() < 0.005:
                scheduler.cancel(list(added))
                added = [s for s in added if s.num_generated]
                admitted = [s for s in admitted if s.num_generated]
            if not scheduler.has_work:
                continue
            step = scheduler.schedule()
            assert step, "work that never runs"
            new = [s for s in step if s.num_computed == 0]
            assert new in ([], step), "a step prefills or decodes"
            admitted += new
            if len(new) > 1:
                assert sum(len(s.token_ids) for s in new) <= scheduler.max_prefill_tokens
            for sequence in step:
                assert len(sequence.pages) * pages.page_size >= sequence.max_length
                sequence.num_computed = len(sequence.token_ids)
                sequence.append(END if rng.random() < 0.1 else 7)
            scheduler.finish(step)
            assert len(scheduler.running) <= scheduler.max_num_seqs
            pages.check_integrity([s.pages for s in scheduler.running])
        assert admitted == added[: len(admitted)], "first come, first served"


def test_integrity_check_sees_a_lost_and_a_doubled_page() -> None:
    pages = PageAllocator(4, 8)
    held = pages.allocate(9)
    pages.check_integrity([held])
    with pytest.raises(AssertionError):
        pages.check_integrity([held[:1]])
    pages.free(held[:1])
    with pytest.raises(AssertionError):
        pages.check_integrity([held])


def test_end_tokens_wait_for_min_tokens() -> None:
    sequence = make_sequence(3, 9, min_tokens=2)
    sequence.append(END)
    assert not sequence.output().finish_reason
    sequence.append(END)
    assert sequence.output().finish_reason == "stop"
    assert sequence.stop_reason is None
    assert sequence.output().token_ids == [END, END]


def test_the_last_token_may_end_or_fill() -> None:
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


def test_the_first_of_two_stop_strings_ends_it() -> None:
    sequence = make_sequence(1, 9, stop=["cd", "bc"])
    for letter in "abcd":
        if not sequence.finish_reason:
            sequence.append(ord(letter) - ord("a"))
    assert (sequence.text, sequence.stop_reason) == ("a", "bc")


def test_a_stop_token_is_the_reason() -> None:
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
