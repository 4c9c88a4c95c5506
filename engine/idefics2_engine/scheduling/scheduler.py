"""The scheduler, which chooses the tokens of each step first come, first served; host only.

A step has a budget of tokens, which decoding sequences and chunks of prompts share, and a budget of
patches for the tiles that it encodes. Running sequences are scheduled first, oldest first. Waiting
sequences are then admitted in order. If a running sequence needs a page and none is free, the
newest running sequence is preempted. It waits before all others, and tokens that the cache no
longer has are recomputed. The oldest sequence therefore always makes progress.

Requests of a caller who waits for all of them (``Request.may_wait``) are held back for a few steps
until several can join, and long answers begin first (``AdmissionPolicy``, ``WaitingQueue``).

A step may be planned while tokens of the previous step are still being drawn
(``Sequence.num_pending``), because their positions are known and steps are computed in order.

Sequences that only move on by a token are planned together, as arrays of ``SequenceTable``. Python
runs for the others: those with a prompt to compute, images, or a page to allocate, copy, name or
release.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from idefics2_engine.scheduling.admission import AT_ONCE, AdmissionPolicy
from idefics2_engine.scheduling.encoder_cache import EncoderCache
from idefics2_engine.scheduling.page_allocator import NO_PAGE, PageAllocator, most_pages
from idefics2_engine.scheduling.placeholders import Encodable, items_between
from idefics2_engine.scheduling.sampling_columns import SAMPLING, sampling_record
from idefics2_engine.scheduling.sequence import Sequence
from idefics2_engine.scheduling.sequence_table import Entry, Ints, SequenceTable
from idefics2_engine.scheduling.step import Chunk, Decodes, Step
from idefics2_engine.scheduling.waiting_queue import WaitingQueue

# Sequences that are passed over in a step, so that its work is bounded
_MAX_POSTPONED = 16


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
        admission: When waiting sequences join, and whether long ones may overtake.
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
        admission: AdmissionPolicy = AT_ONCE,
    ) -> None:
        self.pages = pages
        self.encoder = encoder
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_patches = max_patches
        self.window = window
        self.prefix_caching = prefix_caching
        self.admission = admission
        self.waiting: WaitingQueue[Sequence] = WaitingQueue(admission.patience)
        # Steps for which sequences have been held back that could have been admitted
        self._num_held = 0
        self.table = SequenceTable(pages.page_size, SAMPLING)
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(len(self.waiting) or len(self.table))

    @property
    def running(self) -> list[Sequence]:
        """Running sequences, the oldest first."""
        return [*self.table.owners[self.table.order]]

    def most_pages(self, length: int) -> int:
        """Return the most pages that a sequence of ``length`` tokens holds."""
        return most_pages(length, self.pages.page_size, self.window, self.max_num_batched_tokens)

    def add(self, sequence: Sequence) -> None:
        """Append ``sequence``, which must fit an empty cache, to the queue."""
        assert self.most_pages(sequence.max_length) <= self.pages.num_pages
        request = sequence.request
        request.num_started += 1
        self.waiting.add(sequence, request.max_tokens if request.may_wait else None)

    def schedule(self) -> Step:
        """Choose the tokens of the next step and allocate pages and encoder cache entries."""
        plan = _Plan(self.max_num_batched_tokens, self.max_patches)
        preempted, rows = self._go_on(plan)
        if not preempted:
            self._admit(plan)
        table = self.table
        decodes = Decodes(
            rows=rows,
            sequences=table.owners[rows],
            positions=table.num_computed[rows],
            token_ids=table.input_tokens(rows),
            block_table=table.block_table(rows),
        )
        return Step(
            decodes, plan.chunks, plan.encodes, plan.copies, plan.cached_tokens, plan.cached_tiles
        )

    def computed(self, step: Step) -> None:
        """Mark ``step`` as computed: name full pages and release unneeded pages and images."""
        table, rows = self.table, step.decodes.rows
        table.num_computed[rows] += 1
        is_due = self._num_full(rows) > table.num_named[rows]
        if self.window is not None:
            behind = _pages_behind(table.num_computed[rows], self.window, table.page_size)
            is_due |= behind > table.num_behind[rows]
        due = [*step.decodes.sequences[is_due]]
        for chunk in step.chunks:
            table.num_computed[chunk.sequence.row] = chunk.end
            due.append(chunk.sequence)
        for sequence in due:
            self._name_pages(sequence)
            self._let_go_behind(sequence)

    def fork(self, first: Sequence) -> list[Sequence]:
        """Start the other answers of a request after ``first`` has computed its prompt.

        As many as may run share the pages of ``first``. The rest wait before all others.

        Returns:
            The sequences that run.
        """
        request, table = first.request, self.table
        others = request.sequences[request.num_started :]
        request.num_started = len(request.sequences)
        forked = others[: self.max_num_seqs - len(table)]
        for sequence in reversed(forked):
            row = self._run(sequence, after=first.row)
            table.add_pages(row, first.pages)
            self.pages.share(first.pages)
            for counts in (table.num_computed, table.num_named, table.num_behind):
                counts[row] = counts[first.row]
        for sequence in (first, *forked) if forked else ():
            # The last page is shared, unless it is full
            table.room[sequence.row] = sequence.num_computed
        for sequence in reversed(others[len(forked) :]):
            self._wait_first(sequence)
        return forked

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Remove those of ``sequences`` that have ended."""
        for sequence in sequences:
            if not sequence.finish_reason:
                continue
            if sequence.table is self.table:
                self._name_pages(sequence)
                self._drop(sequence)
            else:
                # The sequence was preempted while its last token was drawn
                self.waiting.remove(sequence)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Drop those of ``sequences`` that wait or run."""
        for sequence in sequences:
            if sequence.table is self.table:
                self._drop(sequence)
            else:
                self.waiting.remove(sequence)
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
        sequence: Sequence = self.table.owners[self.table.order[-1]]
        self._drop(sequence)
        self._wait_first(sequence)
        self.num_preemptions += 1
        return sequence

    def start_over(self) -> None:
        """Preempt all running sequences and evict every image, after a failed step."""
        while len(self.table):
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
        """Assert that arrays agree with the sequences, which alone hold pages and images."""
        running, table = self.running, self.table
        table.check_integrity()
        self.pages.check_integrity([sequence.pages for sequence in running])
        self.encoder.check_integrity(
            [item.tile.fingerprint for s in running for item in s.held_images]
        )
        assert not any(sequence.table or sequence.held_images for sequence in self.waiting)
        assert all(sequence.table is table for sequence in running)
        assert [sequence.row for sequence in running] == table.order.tolist()
        for sequence in running:
            row, computed, pages = sequence.row, sequence.num_computed, sequence.pages
            assert table.holds(row, sequence, _entry(sequence))
            assert 0 <= computed <= sequence.length <= sequence.max_length
            room = int(table.room[row])
            assert computed <= room <= len(pages) * table.page_size
            size = table.page_size
            for page in pages[computed // size : -(-room // size)] if room > computed else ():
                assert page != NO_PAGE
                assert not self.pages.is_shared(page)
            behind = int(table.num_behind[row])
            assert pages[:behind] == [NO_PAGE] * behind
            assert NO_PAGE not in pages[behind:]
            assert behind == self._num_behind(computed)
            assert int(table.num_named[row]) <= computed // table.page_size

    def _run(self, sequence: Sequence, after: int | None = None) -> int:
        """Give ``sequence`` a row without pages, behind the row ``after`` or the last one."""
        row = self.table.add(sequence, _entry(sequence), after)
        sequence.start_running(self.table, row)
        return row

    def _go_on(self, plan: "_Plan") -> tuple[bool, Ints]:
        """Plan the next tokens of running sequences.

        Returns:
            Whether any sequence was preempted. Then the rows that move on by a token; the others
            have chunks.
        """
        table = self.table
        order = table.order
        moves_on = table.moves_on(order)
        # If the last token is being drawn, no further token is computed
        may_grow = table.lengths[order] < table.max_length[order]
        moves_on &= may_grow
        tokens = moves_on.astype(np.int64)
        budget, taken, preempted = plan.tokens, 0, False
        before = np.cumsum(tokens)
        for place in np.flatnonzero(may_grow & ~moves_on).tolist():
            left = budget - taken - int(before[place])
            # Preemption starts with the newest, so all after a preempted one are preempted as well
            if left <= 0 or place >= len(table):
                break
            sequence: Sequence = table.owners[order[place]]
            begin = sequence.num_computed
            end = min(sequence.length, begin + left)
            end = self._image_limit(sequence, begin, end, plan)
            while end > begin and not self._has_room(sequence, begin, end):
                preempted = True
                if self.preempt_newest() is sequence:
                    end = begin
            if end > begin:
                self._take_pages(sequence, begin, end, plan)
                self._plan(sequence, begin, end, plan)
                tokens[place] = end - begin
                taken += end - begin
        total = np.cumsum(tokens)
        moves_on &= total <= budget
        kept = order[: len(table)][moves_on[: len(table)]]
        plan.tokens = budget - taken - len(kept)
        return preempted, kept

    def _admit(self, plan: "_Plan") -> None:
        if self._is_held(plan):
            return
        size = self.pages.page_size
        # Sequences whose next page is computed in this step and is in the cache from the next on
        postponed: set[Sequence] = set()
        while plan.tokens and len(self.table) < self.max_num_seqs:
            sequence = self.waiting.next(postponed)
            if sequence is None:
                return
            cached = []
            if self.prefix_caching:
                # At least one token must be computed, because its logits are needed
                known = len(sequence.token_ids) - 1
                if sequence.scores_prompt:
                    known = min(known, len(sequence.request.prompt_logprobs))
                names = sequence.page_names(size)[: known // size]
                cached = self.pages.find(names)
                following = names[len(cached) : len(cached) + 1]
                if plan.page_names.intersection(following) and not self.waiting.is_fixed:
                    postponed.add(sequence)
                    if len(postponed) == _MAX_POSTPONED:
                        return
                    continue
            begin = len(cached) * size
            behind = self._num_behind(begin)
            cached[:behind] = [NO_PAGE] * behind
            end = self._image_limit(
                sequence, begin, min(len(sequence.token_ids), begin + plan.tokens), plan
            )
            wanted = self.pages.pages_for(end) - len(cached)
            # One page for each running sequence stays free. Otherwise the new sequence would soon
            # be preempted
            spare = self.pages.num_free - self.pages.num_idle(cached) - len(self.table)
            if end == begin or wanted > spare:
                return
            self.pages.share(cached)
            plan.cached_tokens += begin
            plan.cached_tiles += sum(item.end <= begin for item in sequence.request.images)
            self.waiting.take(sequence)
            row = self._run(sequence)
            self.table.add_pages(row, cached)
            self.table.num_computed[row], self.table.num_named[row] = begin, len(cached)
            self.table.num_behind[row] = behind
            if sequence.request.num_cached_tokens is None:
                sequence.request.num_cached_tokens = begin
            self._take_pages(sequence, begin, end, plan)
            self._plan(sequence, begin, end, plan)

    def _is_held(self, plan: "_Plan") -> bool:
        """Return whether sequences that could be admitted now are held back, and count this."""
        ready = min(len(self.waiting), self.max_num_seqs - len(self.table))
        computes_prompt = any(chunk.end - chunk.begin > 1 or chunk.images for chunk in plan.chunks)
        is_held = ready > 0 and not self.admission.admits(
            running=len(self.table),
            ready=ready,
            held=self._num_held,
            is_urgent=self.waiting.is_fixed or computes_prompt,
        )
        self._num_held = self._num_held + 1 if is_held else 0
        return is_held

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
        missing = self.pages.pages_for(end) - int(self.table.num_pages[sequence.row])
        return missing + self._writes_shared_page(sequence, begin) <= self.pages.num_free

    def _writes_shared_page(self, sequence: Sequence, begin: int) -> bool:
        index = begin // self.pages.page_size
        if index >= self.table.num_pages[sequence.row]:
            return False
        return self.pages.is_shared(int(self.table.pages[sequence.row, index]))

    def _take_pages(self, sequence: Sequence, begin: int, end: int, plan: "_Plan") -> None:
        """Allocate pages up to ``end``, and a copy of a shared page that would be written to."""
        table, row = self.table, sequence.row
        if self._writes_shared_page(sequence, begin):
            index = begin // self.pages.page_size
            shared, (own,) = int(table.pages[row, index]), self.pages.allocate(1)
            plan.copies.append((shared, own))
            self.pages.release([shared])
            table.pages[row, index] = own
        missing = self.pages.pages_for(end) - int(table.num_pages[row])
        table.add_pages(row, self.pages.allocate(max(0, missing)))
        table.room[row] = table.num_pages[row] * self.pages.page_size

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
        if self.prefix_caching and end - begin > 1:
            size = self.pages.page_size
            plan.page_names.update(sequence.page_names(size)[begin // size : end // size])
        plan.tokens -= end - begin
        samples, scores = end == sequence.length, range(0)
        if sequence.scores_prompt:
            request = sequence.request
            # The last prompt token has no following prompt token to score
            last = len(request.prompt_token_ids) - 1
            scores = range(max(begin, len(request.prompt_logprobs)), min(end, last))
        token_ids = sequence.token_ids[begin:end]
        if len(token_ids) < end - begin:
            token_ids.append(-1 - int(self.table.drawn_row[sequence.row]))
        plan.chunks.append(Chunk(sequence, begin, end, token_ids, samples, scores, images))

    def _num_full(self, rows: Ints) -> Ints:
        """Return how many pages of each row have only known tokens."""
        table = self.table
        if not self.prefix_caching:
            return np.zeros_like(rows)
        return np.minimum(table.num_computed[rows], table.num_known[rows]) // table.page_size

    def _name_pages(self, sequence: Sequence) -> None:
        """Name full pages whose tokens are all known."""
        if not self.prefix_caching:
            return
        table, row = self.table, sequence.row
        size = self.pages.page_size
        num_named, num_full = (
            int(table.num_named[row]),
            min(sequence.num_computed, int(table.num_known[row])) // size,
        )
        if num_full > num_named:
            names = sequence.page_names(size)
            for index in range(num_named, num_full):
                self.pages.remember(int(table.pages[row, index]), names[index])
            table.num_named[row] = num_full

    def _let_go_behind(self, sequence: Sequence) -> None:
        """Release images that have been read and pages that no later query attends to."""
        table, row = self.table, sequence.row
        for item in list(sequence.held_images):
            if item.end <= table.num_computed[row]:
                sequence.held_images.remove(item)
                self.encoder.release(item.tile.fingerprint)
        first, end = int(table.num_behind[row]), self._num_behind(sequence.num_computed)
        if end > first:
            self.pages.release(table.pages[row, first:end].tolist())
            table.pages[row, first:end] = NO_PAGE
            table.num_behind[row] = end

    def _num_behind(self, position: int) -> int:
        """Return how many pages are outside the window of ``position`` and later queries."""
        return (
            0
            if self.window is None
            else int(_pages_behind(position, self.window, self.pages.page_size))
        )

    def _wait_first(self, sequence: Sequence) -> None:
        """Put ``sequence`` at the front of the queue."""
        self.waiting.add_first(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Release everything that the running ``sequence`` holds."""
        self.pages.release(sequence.pages)
        sequence.stop_running()
        for item in sequence.held_images:
            self.encoder.release(item.tile.fingerprint)
        sequence.held_images = []


def _entry(sequence: Sequence) -> Entry:
    token_ids = sequence.known_tokens()
    return Entry(
        num_prompt=len(sequence.request.prompt_token_ids),
        num_known=len(token_ids),
        num_pending=sequence.num_pending,
        max_length=sequence.max_length,
        last_token=token_ids[-1],
        end_tokens=sequence.end_token_ids,
        asks=sequence.asks,
        record=sampling_record(sequence),
    )


def _pages_behind(positions: Ints | int, window: int, page_size: int) -> Any:
    """Return how many pages are outside the windows of ``positions`` and later queries."""
    return np.maximum(0, positions - window + 1) // page_size


class _Plan:
    """A step under construction, with the rest of its budgets."""

    def __init__(self, tokens: int, patches: int) -> None:
        self.tokens = tokens
        self.patches = patches
        self.chunks: list[Chunk] = []
        self.encodes: list[tuple[Encodable, int]] = []
        self.copies: list[tuple[int, int]] = []
        # Names of the pages that prompts fill in this step
        self.page_names: set[bytes] = set()
        self.cached_tokens = 0
        self.cached_tiles = 0
