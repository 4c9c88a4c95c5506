"""The pages of the KV cache that a job holds at once: a bound, and what is likely."""

import heapq

from idefics2_engine.jobs.plan.distribution import Distribution
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_engine.scheduling.page_allocator import most_pages


class KvEstimate:
    """Peak pages of the sequences that are added, in the order of the input.

    The bound is the pages of the largest sequences, as many as may run at once, at their greatest
    length. The likely peak is that of a schedule in which a sequence starts whenever another one
    ends, and gets one token a step.

    Args:
        max_num_seqs: Most sequences at once.
        window: Keys that a query attends to. All if ``None``.
        step_tokens: Most tokens of a step.

    Attributes:
        pages: Most pages of each sequence.
    """

    def __init__(self, max_num_seqs: int, window: int | None, step_tokens: int) -> None:
        self.pages = Distribution()
        self._max_num_seqs = max_num_seqs
        self._window = window
        self._step_tokens = step_tokens
        # By the step in which it ends: the tokens of a running sequence, less its first step
        self._running: list[tuple[int, int]] = []
        self._step = 0
        self._offset = 0
        self._peak = 0

    def add(self, prompt: int, held: int, max_tokens: int, expected: int, count: int = 1) -> None:
        """Add the sequences of one row.

        Args:
            prompt: Tokens of the prompt.
            held: Those that no other sequence holds as well.
            max_tokens: Most tokens of each answer.
            expected: Tokens that an answer is expected to have.
            count: Answers, which share the prompt.
        """
        most = most_pages(prompt + max_tokens, PAGE_SIZE, self._window, self._step_tokens)
        self.pages.add(most, count)
        for tokens in [held] + [0] * (count - 1):
            if len(self._running) == self._max_num_seqs:
                self._end_one()
            start = min(tokens, most * PAGE_SIZE) - self._step
            heapq.heappush(self._running, (self._step + expected, start))
            self._offset += start

    @property
    def bound(self) -> int:
        """Pages that are never exceeded."""
        return self.pages.largest_sum(self._max_num_seqs)

    def likely(self) -> int:
        """Return the likely peak in pages, after all sequences are added."""
        while self._running:
            self._end_one()
        return min(self._peak, self.bound)

    def _end_one(self) -> None:
        """Go on to the step in which the next sequence ends, before which most tokens are held."""
        count = len(self._running)
        self._step, start = heapq.heappop(self._running)
        tokens = self._offset + count * self._step
        # On average half of a sequence's last page is empty
        self._peak = max(self._peak, -(-tokens // PAGE_SIZE) + -(-count // 2))
        self._offset -= start
