"""Pages, images and scheduling on the host alone, with full accounting after every step.

``Machine`` simulates the model. It writes into each slot of the cache the inputs of the token
there, its whole prefix and the images in it, and reads back everything that the token's query
would see. A page that is lost, shared too far, copied too late or freed too early gives a wrong
value.
"""

import gc
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import booleans, integers, sampled_from

from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.admission import AT_ONCE, AdmissionPolicy
from idefics2_engine.scheduling.encoder_cache import EncoderCache
from idefics2_engine.scheduling.page_allocator import NO_PAGE, PageAllocator
from idefics2_engine.scheduling.placeholders import ImageItem, image_items, items_between
from idefics2_engine.scheduling.scheduler import Scheduler
from idefics2_engine.scheduling.sequence import Request, Sequence
from idefics2_engine.scheduling.step import Chunk, Step
from letters import Letters

END, IMAGE, LATENTS = 30, 9, 4


@dataclass(frozen=True, eq=False)
class Picture:
    """A fake tile."""

    fingerprint: bytes
    num_patches: int


def make_request(
    token_ids: list[int], max_tokens: int = 4, pictures: tuple[Picture, ...] = (), n: int = 1
) -> Request:
    """Build a request whose image tokens, ``LATENTS`` in a row, are ``pictures``."""
    request = Request(
        request_id="0",
        prompt="",
        prompt_token_ids=token_ids,
        images=image_items(token_ids, cast(Any, pictures), IMAGE, LATENTS),
        params=SamplingParams(max_tokens=max_tokens, n=n),
        seed=0,
        max_tokens=max_tokens,
    )
    for index in range(n):
        request.sequences.append(Sequence(request, index, frozenset({END}), cast(Any, Letters())))
    return request


def make_scheduler(
    num_pages: int = 8,
    page_size: int = 4,
    num_entries: int = 4,
    max_num_seqs: int = 4,
    tokens: int = 16,
    patches: int = 100,
    window: int | None = None,
    prefix_caching: bool = True,
    admission: AdmissionPolicy = AT_ONCE,
) -> Scheduler:
    pages = PageAllocator(num_pages, page_size)
    encoder = EncoderCache(num_entries)
    return Scheduler(
        pages, encoder, max_num_seqs, tokens, patches, window, prefix_caching, admission
    )


def chunks_of(step: Step) -> list[Chunk]:
    """Return the work of ``step``, a chunk for each sequence that moves on as well."""
    decodes = step.decodes
    return [
        *(
            Chunk(sequence, position, position + 1, [token], True, range(0), [])
            for sequence, position, token in zip(
                decodes.sequences,
                decodes.positions.tolist(),
                decodes.token_ids.tolist(),
                strict=True,
            )
        ),
        *step.chunks,
    ]


def spans(step: Step) -> list[tuple[int, int, bool]]:
    return [(chunk.begin, chunk.end, chunk.samples) for chunk in chunks_of(step)]


class Machine:
    """A simulated model whose cache holds each token's inputs.

    With ``ahead`` a step is planned before the tokens of the last one are known. Tokens, pending
    tokens and computed tokens of each sequence are counted once more, without arrays.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        rng: random.Random,
        end_rate: float = 0.1,
        *,
        ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.end_rate = end_rate
        self.ahead = ahead
        # Tokens that were drawn and are not reported yet, with the rows and their serial numbers
        self.drawn: list[tuple[Sequence, int]] = []
        self.places: tuple[Any, Any] = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.tokens: dict[Sequence, list[int]] = {}
        self.num_quiet = 0
        self.size = scheduler.pages.page_size
        self.cache: list[object] = ["NaN"] * (scheduler.pages.num_pages * self.size)
        self.slots: list[object] = ["NaN"] * scheduler.encoder.num_entries
        self.prefixes: dict[Sequence, list[int]] = {}
        self.begun: list[Request] = []

    def add(self, request: Request) -> None:
        self.scheduler.add(request.sequences[0])

    def step(self) -> Step:
        scheduler = self.scheduler
        preempted = scheduler.num_preemptions
        step = scheduler.schedule()
        chunks = chunks_of(step)
        # A sequence may wait for an image that a newer one held until it was preempted
        is_blocked = scheduler.num_preemptions > preempted
        assert chunks or self.drawn or is_blocked, "work that never runs"
        assert len(chunks) == step.num_sequences
        assert sum(c.end - c.begin for c in chunks) == step.num_tokens
        assert step.num_tokens <= scheduler.max_num_batched_tokens
        patches = [tile.num_patches for tile, _ in step.encodes]
        assert len(patches) <= 1 or sum(patches) <= scheduler.max_patches
        assert len({slot for _, slot in step.encodes}) == len(patches)
        self._run(step)
        scheduler.computed(step)
        drawn: list[Sequence] = [*step.decodes.sequences]
        for chunk in chunks:
            assert chunk.sequence.table is scheduler.table
            assert chunk.sequence.num_computed == chunk.end
            if chunk.sequence.request not in self.begun:
                self.begun.append(chunk.sequence.request)
        for chunk in step.chunks:
            if chunk.samples:
                drawn += [chunk.sequence, *scheduler.fork(chunk.sequence)]
        before = self.drawn, *self.places
        table = scheduler.table
        rows = np.array([sequence.row for sequence in drawn], np.int64)
        self.drawn = [(sequence, self._token()) for sequence in drawn]
        self.places = rows, table.serials[rows]
        table.drew(rows)
        for sequence, place in zip(drawn, range(len(drawn)), strict=True):
            assert table.drawn_row[sequence.row] == place
        self._tell(*before)
        if not self.ahead:
            self._tell(self.drawn, *self.places)
            self.drawn, self.places = [], (rows[:0], rows[:0])
        scheduler.check_integrity()
        for sequence in scheduler.running:
            known = self.tokens.get(sequence, sequence.request.prompt_token_ids)
            assert sequence.known_tokens() == known
            assert sequence.num_pending == sum(one is sequence for one, _ in self.drawn)
        assert len(scheduler.running) <= scheduler.max_num_seqs
        return step

    def _token(self) -> int:
        return END if self.rng.random() < self.end_rate else self.rng.randrange(5, 9)

    def _tell(self, drawn: list[tuple[Sequence, int]], rows: Any, serials: Any) -> None:
        # Sequences that have ended or were canceled since get no token
        told = [(one, token) for one, token in drawn if one.num_pending]
        for sequence, token in told:
            known = self.tokens.setdefault(sequence, [*sequence.request.prompt_token_ids])
            known.append(token)
        tokens = np.array([token for _, token in drawn], np.int64)
        usable = np.ones(len(drawn), np.bool_)
        rest = self.scheduler.table.append(rows, serials, tokens, usable).tolist()
        self.num_quiet += len(drawn) - len(rest)
        for sequence, token in (drawn[place] for place in rest):
            if sequence.num_pending:
                sequence.append(token)
        for sequence, _ in told:
            if sequence.finish_reason:
                assert sequence.known_tokens() == self.tokens.pop(sequence)
        self.scheduler.finish(sequence for sequence, _ in drawn)

    def _run(self, step: Step) -> None:
        for tile, slot in step.encodes:
            self.slots[slot] = tile.fingerprint
        targets = {target for _, target in step.copies}
        assert not targets & {source for source, _ in step.copies}
        for source, target in step.copies:
            self.cache[target * self.size : (target + 1) * self.size] = self.cache[
                source * self.size : (source + 1) * self.size
            ]
        chunks = chunks_of(step)
        places = [
            self._place(chunk.sequence, position)
            for chunk in chunks
            for position in range(chunk.begin, chunk.end)
        ]
        assert len(set(places)) == len(places), "two tokens in one place"
        for chunk in chunks:
            sequence = chunk.sequence
            # A token that is being drawn is named by its place in the last draw
            last = [-1 - place for place, (one, _) in enumerate(self.drawn) if one is sequence]
            known = [*self.tokens.get(sequence, sequence.request.prompt_token_ids), *last]
            assert chunk.token_ids == known[chunk.begin : chunk.end]
            wanted = list(items_between(sequence.request.images, chunk.begin, chunk.end))
            assert [item for item, _ in chunk.images] == wanted
            for item, slot in chunk.images:
                assert self.slots[slot] == item.tile.fingerprint
            prefix = self._prefix(sequence)
            for position in range(chunk.begin, chunk.end):
                self.cache[self._place(sequence, position)] = prefix[position]
        for chunk in chunks:
            window = self.scheduler.window or chunk.end
            prefix = self._prefix(chunk.sequence)
            for position in range(max(0, chunk.begin - window + 1), chunk.end):
                assert self.cache[self._place(chunk.sequence, position)] == prefix[position]

    def _place(self, sequence: Sequence, position: int) -> int:
        page = sequence.pages[position // self.size]
        assert page != NO_PAGE
        return page * self.size + position % self.size

    def _prefix(self, sequence: Sequence) -> list[int]:
        """Return a number for each token that identifies it and all tokens before it."""
        known = self.prefixes.setdefault(sequence, [])
        pictures: dict[int, ImageItem] = {
            at: item for item in sequence.request.images for at in range(item.begin, item.end)
        }
        tokens = [
            *sequence.known_tokens(),
            *(token for one, token in self.drawn if one is sequence),
        ]
        for at in range(len(known), len(tokens)):
            item = pictures.get(at)
            own = (item.tile.fingerprint, at - item.begin) if item else tokens[at]
            known.append(hash((known[-1] if known else 0, own)))
        return known


PICTURES = [Picture(bytes([i]), 10 * (1 + i % 4)) for i in range(6)]


def draw_request(rng: random.Random, longest: int) -> Request:
    """Draw a request that may have images, several answers and a prefix shared with others."""
    token_ids: list[int] = []
    pictures: list[Picture] = []
    common = rng.random() < 0.6
    for part in range(rng.randint(1, 5)):
        if rng.random() < 0.4:
            token_ids += [IMAGE] * LATENTS
            pictures.append(PICTURES[part if common else rng.randrange(len(PICTURES))])
        count = rng.randint(1, 9)
        token_ids += [7] * count if common else [rng.randrange(5, 9) for _ in range(count)]
    while len(token_ids) > longest - 1:
        if token_ids.pop() == IMAGE:
            del token_ids[-(LATENTS - 1) :]
            pictures.pop()
    token_ids = token_ids or [7]
    room = longest - len(token_ids)
    return make_request(
        token_ids, rng.randint(1, min(20, room)), tuple(pictures), rng.choice([1, 1, 1, 3])
    )


@pytest.mark.long
def test_fuzz() -> None:
    """Run 20,000 steps of 50 machines of all sizes.

    Every request ends. Requests start in order, unless they may be overtaken.
    """
    rng = random.Random(0)
    for _ in range(50):
        scheduler = make_scheduler(
            num_pages=rng.randint(4, 40),
            page_size=rng.choice([1, 4, 16]),
            num_entries=rng.randint(1, 6),
            max_num_seqs=rng.randint(1, 6),
            tokens=rng.choice([1, 3, 20, 1000]),
            patches=rng.choice([5, 30, 1000]),
            window=rng.choice([None, None, 3, 17]),
            prefix_caching=rng.random() < 0.8,
            admission=rng.choice([AT_ONCE, AdmissionPolicy(2, 3, 1, 5)]),
        )
        may_wait = rng.choice([0.0, 0.0, 0.5, 1.0])
        machine = Machine(scheduler, rng, rng.choice([0.05, 0.3]), ahead=rng.random() < 0.5)
        added: list[Request] = []
        order: list[Request] = []
        for _ in range(400):
            if rng.random() < 0.4 and len(scheduler.waiting) < 20:
                capacity = scheduler.pages.num_pages * scheduler.pages.page_size
                added.append(draw_request(rng, min(60, capacity)))
                order.append(added[-1])
                added[-1].may_wait = rng.random() < may_wait
                machine.add(added[-1])
            if rng.random() < 0.01 and added:
                canceled = rng.choice(added)
                scheduler.cancel(canceled.sequences)
                scheduler.check_integrity()
                added.remove(canceled)
            if scheduler.has_work:
                machine.step()
        while scheduler.has_work:
            machine.step()
        assert all(request.finished for request in added)
        begun = [one for one in machine.begun if not may_wait or not one.may_wait]
        assert begun == sorted(begun, key=order.index), "first come, first served"
        assert scheduler.pages.num_free == scheduler.pages.num_pages


@settings(max_examples=40, stateful_step_count=60, deadline=None)
class SchedulerMachine(RuleBasedStateMachine):
    """The same simulated model, with its work chosen by Hypothesis."""

    @initialize(
        num_pages=integers(5, 12),
        tokens=sampled_from([1, 5, 64]),
        window=sampled_from([None, 6]),
        slots=integers(1, 3),
        ahead=booleans(),
    )
    def build(
        self, num_pages: int, tokens: int, window: int | None, slots: int, ahead: bool
    ) -> None:
        self.rng = random.Random(num_pages)
        scheduler = make_scheduler(num_pages, 4, slots, 3, tokens, 25, window)
        self.machine = Machine(scheduler, self.rng, ahead=ahead)
        self.requests: list[Request] = []

    @rule(seed=integers(0, 10**6))
    def add(self, seed: int) -> None:
        self.requests.append(draw_request(random.Random(seed), 20))
        self.machine.add(self.requests[-1])

    @precondition(lambda self: self.machine.scheduler.has_work)
    @rule()
    def step(self) -> None:
        self.machine.step()

    @precondition(lambda self: self.requests)
    @rule(index=integers(0, 100))
    def cancel(self, index: int) -> None:
        request = self.requests.pop(index % len(self.requests))
        self.machine.scheduler.cancel(request.sequences)

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "machine"):
            self.machine.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            while self.machine.scheduler.has_work:
                self.machine.step()
            assert all(request.finished for request in self.requests)


test_state_machine = SchedulerMachine.TestCase


def test_requests_are_admitted_in_order() -> None:
    scheduler = make_scheduler(num_pages=20, max_num_seqs=2)
    requests = [make_request([7] * 5, 2) for _ in range(5)]
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    for request in requests:
        machine.add(request)
    begun: list[Sequence] = []
    while scheduler.has_work:
        for chunk in chunks_of(machine.step()):
            if chunk.sequence not in begun:
                begun.append(chunk.sequence)
    assert begun == [request.sequences[0] for request in requests]


def test_sequences_join_together_while_others_decode() -> None:
    """Three sequences that end one after the other are replaced in one step."""
    scheduler = make_scheduler(60, 4, max_num_seqs=6, admission=AdmissionPolicy(3, 5, 3))
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    lengths = [4, 5, 6, 30, 30, 30]
    for length in [*lengths, 30, 30, 30]:
        request = make_request([7, 7], length)
        request.may_wait = True
        machine.add(request)
    joined = []
    for step in range(8):
        before = len(scheduler.waiting)
        machine.step()
        if len(scheduler.waiting) < before:
            joined.append((step, before - len(scheduler.waiting)))
    assert joined == [(0, 6), (6, 3)]


def test_a_sequence_is_held_back_a_bounded_number_of_steps() -> None:
    def steps_until(**changes: Any) -> int:
        scheduler = make_scheduler(60, 4, max_num_seqs=6, admission=AdmissionPolicy(3, 5, 3))
        machine = Machine(scheduler, random.Random(0), end_rate=0)
        for _ in range(changes.get("running", 4)):
            machine.add(make_request([7, 7], 30))
        machine.step()
        request = make_request([7, 7], 30)
        request.may_wait = changes.get("may_wait", True)
        machine.add(request)
        steps = 0
        while len(scheduler.waiting):
            machine.step()
            steps += 1
        return steps

    assert steps_until() == 6
    # Few sequences run, or a caller waits for the first token
    assert steps_until(running=2) == 1
    assert steps_until(may_wait=False) == 1


def test_decoding_and_chunks_share_a_step() -> None:
    scheduler = make_scheduler(num_pages=20, tokens=8)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    machine.add(make_request([7] * 3, 9))
    machine.step()
    machine.add(make_request([6] * 20, 9))
    assert spans(machine.step()) == [(3, 4, True), (0, 7, False)]
    # The page after the fourth token is allocated by a chunk
    assert spans(machine.step()) == [(4, 5, True), (7, 14, False)]
    assert spans(machine.step()) == [(5, 6, True), (14, 20, True)]
    assert sorted(spans(machine.step())) == [(6, 7, True), (20, 21, True)]


def test_cached_prefix_is_not_recomputed() -> None:
    scheduler = make_scheduler(num_pages=20)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    prompt = [5, 6, 7, 8] * 2 + [IMAGE] * LATENTS + [5] * 4
    picture, other = PICTURES[:2]
    for pictures, cached in (((picture,), 0), ((picture,), 12), ((other,), 8)):
        request = make_request(list(prompt), 1, pictures)
        machine.add(request)
        while scheduler.has_work:
            machine.step()
        assert request.num_cached_tokens == cached, (
            "the last page has the token whose logits are wanted"
        )


@pytest.mark.parametrize("may_wait", [True, False])
def test_prefix_is_computed_once_if_its_readers_may_wait(may_wait: bool) -> None:
    scheduler = make_scheduler(
        num_pages=40, tokens=64, admission=AdmissionPolicy(patience=1000), max_num_seqs=8
    )
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    prompts = [[5, 6, 7, 8] * 3 + [own] * 3 for own in range(3)] + [[4] * 7]
    requests = [make_request(prompt, 5 - number) for number, prompt in enumerate(prompts)]
    for request in requests:
        request.may_wait = may_wait
        machine.add(request)
    computed = [sum(end - begin for begin, end, _ in spans(machine.step())) for _ in range(2)]
    if may_wait:
        # The first step has one prompt of each prefix, and the others reuse three pages of it
        assert computed == [15 + 7, 2 + 3 + 3]
        assert [request.num_cached_tokens for request in requests] == [0, 12, 12, 0]
    else:
        assert computed == [3 * 15 + 7, 4]


def test_nothing_is_cached_without_prefix_caching() -> None:
    scheduler = make_scheduler(num_pages=20, prefix_caching=False)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    for _ in range(2):
        request = make_request([7] * 9, 1)
        machine.add(request)
        machine.step()
        assert request.num_cached_tokens == 0


def test_answers_share_the_prompt_and_copy_its_last_page() -> None:
    scheduler = make_scheduler(num_pages=20)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    request = make_request([7] * 6, 4, n=3)
    machine.add(request)
    assert spans(machine.step()) == [(0, 6, True)]
    assert [s.pages for s in request.sequences] == [request.sequences[0].pages] * 3
    step = machine.step()
    shared = request.sequences[-1].pages
    assert [source for source, _ in step.copies] == [shared[1]] * 2
    assert len({tuple(s.pages) for s in request.sequences}) == 3
    assert {s.pages[0] for s in request.sequences} == {shared[0]}


def test_newest_sequence_is_preempted_and_resumed_first() -> None:
    scheduler = make_scheduler(num_pages=7, tokens=14, prefix_caching=False)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    old, new, last = (make_request([7] * 7, 16) for _ in range(3))
    for request in (old, new, last):
        machine.add(request)
    while not scheduler.num_preemptions:
        machine.step()
    assert list(scheduler.running) == old.sequences
    assert [s.request for s in scheduler.waiting] == [new, last]
    tokens = new.sequences[0].token_ids[:]
    while scheduler.has_work:
        machine.step()
    assert new.sequences[0].token_ids[: len(tokens)] == tokens
    assert len(new.sequences[0].token_ids) == 23


def test_pages_behind_the_window_are_freed() -> None:
    scheduler = make_scheduler(num_pages=6, tokens=4, window=6, prefix_caching=False)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    # The request is three times as large as the cache
    machine.add(make_request([7] * 50, 10))
    most = 0
    while scheduler.has_work:
        machine.step()
        most = max(most, scheduler.pages.num_pages - scheduler.pages.num_free)
    assert most <= scheduler.most_pages(60) <= 6


def test_image_is_encoded_once_and_cached() -> None:
    scheduler = make_scheduler(num_pages=40, num_entries=2, tokens=100, prefix_caching=False)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    encoded: list[list[object]] = []
    for picture in (PICTURES[0], PICTURES[0], PICTURES[1], PICTURES[0], PICTURES[2], PICTURES[1]):
        machine.add(make_request([7, *[IMAGE] * LATENTS, 7], 1, (picture,)))
        encoded.append([tile for tile, _ in machine.step().encodes])
    # The third image replaces the least recently used one
    assert encoded == [[PICTURES[0]], [], [PICTURES[1]], [], [PICTURES[2]], [PICTURES[1]]]


def test_patches_of_a_step_are_bounded() -> None:
    scheduler = make_scheduler(num_pages=40, tokens=100, patches=30)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    prompt = ([7] + [IMAGE] * LATENTS) * 3 + [7]
    # The images have 10, 20 and 40 patches
    machine.add(make_request(prompt, 1, (PICTURES[0], PICTURES[1], PICTURES[3])))
    done = []
    while scheduler.has_work:
        step = machine.step()
        done.append((step.chunks[0].begin, step.chunks[0].end, len(step.encodes)))
    assert done == [(0, 11, 2), (11, 16, 1)], "what alone exceeds the budget has a step of its own"


@pytest.mark.parametrize(
    "column",
    [
        "order",
        "owners",
        "serials",
        "records",
        "num_prompt",
        "num_known",
        "max_length",
        "last_token",
        "asks",
        "end_tokens",
        "pages",
        "num_pages",
        "num_computed",
        "num_behind",
        "room",
    ],
)
def test_integrity_check_detects_a_wrong_column(column: str) -> None:
    scheduler = make_scheduler(num_pages=20, window=6)
    machine = Machine(scheduler, random.Random(0), end_rate=0)
    for _ in range(2):
        machine.add(make_request([7] * 9, 9))
        machine.step()
    scheduler.check_integrity()
    array = getattr(scheduler.table, column)
    row = 0 if column == "order" else scheduler.table.order[0]
    if column == "records":
        array[row]["temperature"] += 1
    elif column in ("owners", "serials"):
        array[row] = array[scheduler.table.order[1]]
    elif column == "asks":
        array[row] = True
    else:
        array[row] += 5
    with pytest.raises((AssertionError, IndexError)):
        scheduler.check_integrity()


def test_integrity_check_finds_lost_and_duplicate_pages() -> None:
    pages = PageAllocator(4, 8)
    held = pages.allocate(2)
    pages.check_integrity([held])
    with pytest.raises(AssertionError):
        pages.check_integrity([held[:1]])
    pages.release(held[:1])
    with pytest.raises(AssertionError):
        pages.check_integrity([held])


def test_unnamed_pages_are_allocated_before_named_ones() -> None:
    pages = PageAllocator(3, 4)
    first, second, third = pages.allocate(3)
    pages.remember(first, b"first")
    pages.remember(third, b"third")
    pages.release([first])
    pages.release([second, third])
    assert pages.allocate(1) == [second]
    assert pages.allocate(1) == [first], "let go longest ago"
    assert pages.find([b"third", b"first"]) == [third]
    assert pages.find([b"first"]) == []


def count_calls(run: Callable[[], None]) -> int:
    """Return the number of Python and C calls in ``run``, and of comparisons of sequences."""
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    # Hypothesis counts collections in a callback
    gc.disable()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def test_work_of_a_step_does_not_depend_on_the_queue_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Comparisons are counted, because searching a list or queue compares its elements in C."""
    monkeypatch.setattr(Sequence, "__eq__", lambda self, other: self is other, raising=False)
    monkeypatch.setattr(Sequence, "__hash__", object.__hash__, raising=False)
    work = []
    for waiting in (1000, 20_000):
        scheduler = make_scheduler(64, 4, 4, max_num_seqs=4)
        requests = [make_request([7] * 5, 4) for _ in range(waiting)]
        for request in requests:
            scheduler.add(request.sequences[0])

        def serve(scheduler: Scheduler = scheduler) -> None:
            for _ in range(20):
                step = scheduler.schedule()
                scheduler.computed(step)
                drawn = [chunk.sequence for chunk in chunks_of(step) if chunk.samples]
                for sequence in drawn:
                    sequence.num_pending += 1
                    sequence.append(5)
                scheduler.finish(drawn)

        def cancel_some(scheduler: Scheduler = scheduler, requests: Any = requests) -> None:
            for request in requests[500:900]:
                scheduler.cancel(request.sequences)

        work.append((count_calls(serve), count_calls(cancel_some)))
    assert work[0] == work[1]
