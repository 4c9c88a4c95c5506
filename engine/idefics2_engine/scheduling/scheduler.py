"""The scheduler, which chooses the tokens of each step first come, first served; host only.

A step has a budget of tokens, which decoding sequences and chunks of prompts share, and a budget of
patches for the tiles that it encodes. Running sequences are scheduled first, oldest first. Waiting
sequences are then admitted in order. If a running sequence needs a page and none is free, the
newest running sequence is preempted. It waits before all others, and tokens that the cache no
longer has are recomputed. The oldest sequence therefore always makes progress.

A step may be planned while tokens of the previous step are still being drawn
(``Sequence.num_pending``), because their positions are known and steps are computed in order.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from idefics2_engine.images.tiling import Tile
from idefics2_engine.scheduling.encoder_cache import EncoderCache
from idefics2_engine.scheduling.page_allocator import NO_PAGE, PageAllocator
from idefics2_engine.scheduling.placeholders import ImageItem, items_between
from idefics2_engine.scheduling.sequence import Sequence

StepKind = Literal["decode", "text", "image"]
"""An image step encodes tiles, a decode step computes one token of each sequence."""


@dataclass(frozen=True)
class Chunk:
    """Tokens [``begin``, ``end``) of a sequence.

    Attributes:
        sequence: The sequence.
        begin: First token.
        end: One past the last token.
        samples: Whether the chunk ends the sequence, so that the next token is drawn.
        scores: Prompt positions whose logits score the following token.
        images: Images with a token in the chunk, and their encoder cache entries.
    """

    sequence: Sequence
    begin: int
    end: int
    samples: bool
    scores: range
    images: list[tuple[ImageItem, int]]


@dataclass(frozen=True)
class Step:
    """The work of one forward pass: encode tiles, copy pages, then compute the chunks.

    Attributes:
        chunks: Tokens to compute.
        encodes: Tiles to encode, and their encoder cache entries.
        copies: Pages to copy, each (from, to).
        cached_tokens: Tokens that the prefix cache had of the sequences admitted in this step.
        cached_tiles: Tiles of this step's chunks that the encoder cache had, and tiles whose tokens
            are among ``cached_tokens``.
    """

    chunks: list[Chunk]
    encodes: list[tuple[Tile, int]]
    copies: list[tuple[int, int]]
    cached_tokens: int = 0
    cached_tiles: int = 0

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.end - chunk.begin for chunk in self.chunks)

    @cached_property
    def kind(self) -> StepKind:
        """Say what the step does: encode tiles, else decode one token a chunk, else compute text."""
        if self.encodes:
            return "image"
        return "decode" if self.num_tokens == len(self.chunks) else "text"


class Scheduler:
    """Waiting and running sequences with their pages and images.

    Args:
        pages: Allocator of the KV cache's pages.
        encoder: Cache of image embeddings.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most tokens of a step.
        max_patches: Most patches of a step. A larger tile is encoded without others.
        window: Keys that a query attends to. All if ``None``.
        prefix_caching: Whether sequences reuse pages of others with the same prefix.
    """

    def __init__(
        self,
        pages: PageAllocator,
        encoder: EncoderCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_patches: int,
        window: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.pages = pages
        self.encoder = encoder
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_patches = max_patches
        self.window = window
        self.prefix_caching = prefix_caching
        # Ordered dicts keep the order and remove any sequence in constant time
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: OrderedDict[Sequence, None] = OrderedDict()
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def most_pages(self, length: int) -> int:
        """Return the most pages that a sequence of ``length`` tokens holds."""
        if self.window is not None:
            length = min(length, self.window + self.max_num_batched_tokens + self.pages.page_size)
        return self.pages.pages_for(length)

    def add(self, sequence: Sequence) -> None:
        """Append ``sequence``, which must fit an empty cache, to the queue."""
        assert self.most_pages(sequence.max_length) <= self.pages.num_pages
        sequence.request.num_started += 1
        self.waiting[sequence] = None

    def schedule(self) -> Step:
        """Choose the tokens of the next step and allocate pages and encoder cache entries."""
        plan = _Plan(self.max_num_batched_tokens, self.max_patches)
        preempted = self._go_on(plan)
        if not preempted:
            self._admit(plan)
        return Step(plan.chunks, plan.encodes, plan.copies, plan.cached_tokens, plan.cached_tiles)

    def computed(self, step: Step) -> None:
        """Mark ``step`` as computed: name full pages and release unneeded pages and images."""
        for chunk in step.chunks:
            chunk.sequence.num_computed = chunk.end
            self._name_pages(chunk.sequence)
            self._let_go_behind(chunk.sequence)

    def fork(self, first: Sequence) -> list[Sequence]:
        """Start the other answers of a request after ``first`` has computed its prompt.

        As many as may run share the pages of ``first``. The rest wait before all others.

        Returns:
            The sequences that run.
        """
        request = first.request
        others = request.sequences[request.num_started :]
        request.num_started = len(request.sequences)
        forked = others[: self.max_num_seqs - len(self.running)]
        for sequence in forked:
            sequence.num_computed, sequence.num_named = first.num_computed, first.num_named
            sequence.pages = list(first.pages)
            self.pages.share(first.pages)
        if forked:
            running = list(self.running)
            at = running.index(first) + 1
            running[at:at] = forked
            self.running = OrderedDict.fromkeys(running)
        for sequence in reversed(others[len(forked) :]):
            self._wait_first(sequence)
        return forked

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Remove those of ``sequences`` that have ended."""
        for sequence in sequences:
            if not sequence.finish_reason:
                continue
            if sequence in self.running:
                del self.running[sequence]
                self._name_pages(sequence)
                self._drop(sequence)
            else:
                # The sequence was preempted while its last token was drawn
                self.waiting.pop(sequence, None)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Drop those of ``sequences`` that wait or run."""
        for sequence in sequences:
            if sequence in self.running:
                del self.running[sequence]
                self._drop(sequence)
            else:
                self.waiting.pop(sequence, None)
            sequence.num_pending = 0

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Forget the pages and images of ``sequences``, which neither wait nor run."""
        for sequence in sequences:
            self.pages.forget(sequence.page_names(self.pages.page_size))
            self.encoder.forget(item.tile.fingerprint for item in sequence.request.images)

    def preempt_newest(self) -> Sequence:
        """Return the newest running sequence, which must exist, to the front of the queue.

        Its pages are released.
        """
        sequence, _ = self.running.popitem()
        self._drop(sequence)
        self._wait_first(sequence)
        self.num_preemptions += 1
        return sequence

    def start_over(self) -> None:
        """Preempt all running sequences and evict every image, after a failed step."""
        while self.running:
            self.preempt_newest()
        self.encoder.forget_idle()

    def halve_budgets(self) -> bool:
        """Halve the budgets of later steps; return whether they were large enough for that."""
        if self.max_num_batched_tokens <= self.pages.page_size:
            return False
        self.max_num_batched_tokens //= 2
        self.max_patches = max(1, self.max_patches // 2)
        return True

    def check_integrity(self) -> None:
        """Assert that only running sequences hold pages and encoder cache entries."""
        self.pages.check_integrity([sequence.pages for sequence in self.running])
        self.encoder.check_integrity(
            [item.tile.fingerprint for s in self.running for item in s.held_images]
        )
        assert not any(sequence.pages or sequence.held_images for sequence in self.waiting)

    def _go_on(self, plan: "_Plan") -> bool:
        """Plan the next chunks of running sequences; return whether any was preempted."""
        preempted = False
        for sequence in list(self.running):
            # Preemption starts with the newest, so all after a preempted one are preempted as well
            if not plan.tokens or sequence not in self.running:
                break
            begin, end = sequence.num_computed, sequence.length
            if end == sequence.max_length:
                # The last token is being drawn, so no further token is computed
                continue
            end = self._image_limit(sequence, begin, min(end, begin + plan.tokens), plan)
            while end > begin and not self._has_room(sequence, begin, end):
                preempted = True
                if self.preempt_newest() is sequence:
                    return True
            if end > begin:
                self._take_pages(sequence, begin, end, plan)
                self._plan(sequence, begin, end, plan)
        return preempted

    def _admit(self, plan: "_Plan") -> None:
        size = self.pages.page_size
        while self.waiting and plan.tokens and len(self.running) < self.max_num_seqs:
            sequence = next(iter(self.waiting))
            cached = []
            if self.prefix_caching:
                # At least one token must be computed, because its logits are needed
                known = len(sequence.token_ids) - 1
                if sequence.scores_prompt:
                    known = min(known, len(sequence.request.prompt_logprobs))
                names = sequence.page_names(size)[: known // size]
                cached = self.pages.find(names)
            begin = len(cached) * size
            behind = self._num_behind(begin)
            cached[:behind] = [NO_PAGE] * behind
            end = self._image_limit(
                sequence, begin, min(len(sequence.token_ids), begin + plan.tokens), plan
            )
            wanted = self.pages.pages_for(end) - len(cached)
            # One page for each running sequence stays free. Otherwise the new sequence would soon
            # be preempted
            spare = self.pages.num_free - self.pages.num_idle(cached) - len(self.running)
            if end == begin or wanted > spare:
                return
            self.pages.share(cached)
            plan.cached_tokens += begin
            plan.cached_tiles += sum(item.end <= begin for item in sequence.request.images)
            sequence.pages = cached
            sequence.num_computed, sequence.num_named = begin, len(cached)
            if sequence.request.num_cached_tokens is None:
                sequence.request.num_cached_tokens = begin
            del self.waiting[sequence]
            self.running[sequence] = None
            self._take_pages(sequence, begin, end, plan)
            self._plan(sequence, begin, end, plan)

    def _image_limit(self, sequence: Sequence, begin: int, end: int, plan: "_Plan") -> int:
        """Return the last token up to ``end`` whose images can be encoded in this step."""
        patches, entries = plan.patches, self.encoder.num_available
        seen: set[bytes] = set()
        for item in items_between(sequence.request.images, begin, end):
            content = item.tile.fingerprint
            if content in seen:
                continue
            seen.add(content)
            is_held = content in self.encoder and self.encoder.is_held(content)
            entries -= not is_held
            if content not in self.encoder:
                # A tile larger than the budget is encoded if it is the only one
                alone = patches == self.max_patches
                patches -= item.tile.num_patches
                if patches < 0 and not alone:
                    return max(begin, item.begin)
            if entries < 0:
                return max(begin, item.begin)
        return end

    def _has_room(self, sequence: Sequence, begin: int, end: int) -> bool:
        missing = self.pages.pages_for(end) - len(sequence.pages)
        return missing + self._writes_shared_page(sequence, begin) <= self.pages.num_free

    def _writes_shared_page(self, sequence: Sequence, begin: int) -> bool:
        index = begin // self.pages.page_size
        return index < len(sequence.pages) and self.pages.is_shared(sequence.pages[index])

    def _take_pages(self, sequence: Sequence, begin: int, end: int, plan: "_Plan") -> None:
        """Allocate pages up to ``end``, and a copy of a shared page that would be written to."""
        if self._writes_shared_page(sequence, begin):
            index = begin // self.pages.page_size
            shared, (own,) = sequence.pages[index], self.pages.allocate(1)
            plan.copies.append((shared, own))
            self.pages.release([shared])
            sequence.pages[index] = own
        missing = self.pages.pages_for(end) - len(sequence.pages)
        sequence.pages += self.pages.allocate(max(0, missing))

    def _plan(self, sequence: Sequence, begin: int, end: int, plan: "_Plan") -> None:
        """Add a chunk to the plan, and hold the images that it reads."""
        items = list(items_between(sequence.request.images, begin, end))
        # Cached images are held first, so that a new image cannot evict them
        for item in sorted(items, key=lambda item: item.tile.fingerprint not in self.encoder):
            if item in sequence.held_images:
                continue
            content = item.tile.fingerprint
            is_new = content not in self.encoder
            self.encoder.hold(content)
            sequence.held_images.append(item)
            if is_new:
                plan.patches -= item.tile.num_patches
                plan.encodes.append((item.tile, self.encoder.entry(content)))
            else:
                plan.cached_tiles += 1
        images = [(item, self.encoder.entry(item.tile.fingerprint)) for item in items]
        plan.tokens -= end - begin
        samples, scores = end == sequence.length, range(0)
        if sequence.scores_prompt:
            request = sequence.request
            # The last prompt token has no following prompt token to score
            last = len(request.prompt_token_ids) - 1
            scores = range(max(begin, len(request.prompt_logprobs)), min(end, last))
        plan.chunks.append(Chunk(sequence, begin, end, samples, scores, images))

    def _name_pages(self, sequence: Sequence) -> None:
        """Name full pages whose tokens are all known."""
        if not self.prefix_caching:
            return
        size = self.pages.page_size
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // size
        if num_full > sequence.num_named:
            names = sequence.page_names(size)
            for index in range(sequence.num_named, num_full):
                self.pages.remember(sequence.pages[index], names[index])
            sequence.num_named = num_full

    def _let_go_behind(self, sequence: Sequence) -> None:
        """Release images that have been read and pages that no later query attends to."""
        for item in list(sequence.held_images):
            if item.end <= sequence.num_computed:
                sequence.held_images.remove(item)
                self.encoder.release(item.tile.fingerprint)
        for index in range(self._num_behind(sequence.num_computed) - 1, -1, -1):
            if sequence.pages[index] == NO_PAGE:
                break
            self.pages.release([sequence.pages[index]])
            sequence.pages[index] = NO_PAGE

    def _num_behind(self, position: int) -> int:
        """Return how many pages are outside the window of ``position`` and later queries."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.pages.page_size

    def _wait_first(self, sequence: Sequence) -> None:
        """Put ``sequence`` at the front of the queue."""
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)

    def _drop(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = sequence.num_named = 0
        for item in sequence.held_images:
            self.encoder.release(item.tile.fingerprint)
        sequence.held_images = []


class _Plan:
    """A step under construction, with the rest of its budgets."""

    def __init__(self, tokens: int, patches: int) -> None:
        self.tokens = tokens
        self.patches = patches
        self.chunks: list[Chunk] = []
        self.encodes: list[tuple[Tile, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.cached_tokens = 0
        self.cached_tiles = 0
