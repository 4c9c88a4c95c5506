"""Which sequences run in a step: first come, first served; host only."""

from collections import deque

from idefics2_engine.pages import PageAllocator
from idefics2_engine.sequence import Sequence


class Scheduler:
    """Waiting and running sequences.

    A sequence is admitted when there are pages for the longest it can become, so none ever runs out. A step either
    prefills the newly admitted or decodes all that run.
    """

    def __init__(self, pages: PageAllocator, max_num_seqs: int, max_prefill_tokens: int) -> None:
        self.pages = pages
        self.max_num_seqs = max_num_seqs
        self.max_prefill_tokens = (
            max_prefill_tokens  # a step; a longer prompt has a step of its own
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put ``sequence`` at the end of the queue; it must fit an empty cache."""
        assert self.pages.pages_for(sequence.max_length) <= self.pages.num_pages
        self.waiting.append(sequence)

    def schedule(self) -> list[Sequence]:
        """Return the sequences to run in the next step."""
        admitted: list[Sequence] = []
        budget = self.max_prefill_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            length = len(sequence.token_ids)
            if not self.pages.can_allocate(sequence.max_length) or (admitted and length > budget):
                break
            budget -= length
            sequence.pages = self.pages.allocate(sequence.max_length)
            admitted.append(self.waiting.popleft())
            self.running.append(sequence)
        return admitted or list(self.running)

    def finish(self, sequences: list[Sequence]) -> None:
        """Let go of those ``sequences`` that have ended."""
        for sequence in sequences:
            if sequence.finish_reason:
                self.running.remove(sequence)
                self.pages.free(sequence.pages)
                sequence.pages = []

    def cancel(self, sequences: list[Sequence]) -> None:
        """Drop those of ``sequences`` that wait or run."""
        for sequence in sequences:
            if sequence in self.running:
                self.running.remove(sequence)
                self.pages.free(sequence.pages)
                sequence.pages = []
            elif sequence in self.waiting:
                self.waiting.remove(sequence)
