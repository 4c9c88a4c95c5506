"""Bits of the tokens that constrained sequences may draw next, computed on the host.

llguidance's threads compute the bits of all sequences at once. Control tokens are never allowed,
and end tokens exactly where the answer so far satisfies the constraint.
"""

import os
from collections.abc import Sequence as Items
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from idefics2_engine.errors import StructuredOutputError
from idefics2_engine.scheduling.sequence import Sequence
from idefics2_engine.structured.compiler import Words

if TYPE_CHECKING:
    from llguidance import LLExecutor

# 128 sequences take two threads 1.4 ms
_MOST_THREADS = 8


class TokenMasks:
    """Computes the bits of sequences that have a constraint."""

    def compute(
        self, sequences: Items[Sequence]
    ) -> tuple[Words, dict[Sequence, StructuredOutputError]]:
        """Return the bits (R, W) of ``sequences``, whose tokens are all known.

        Also return the errors of sequences that have exceeded a limit.
        """
        constraints = [sequence.request.constraint for sequence in sequences]
        matchers = [sequence.matcher for sequence in sequences]
        sets = [constraint.tokens for constraint in constraints if constraint is not None]
        bits = np.zeros((len(sequences), len(sets[0].usable)), np.int32)
        free = []
        for row, matcher in enumerate(matchers):
            assert matcher is not None
            if matcher.forced:
                word, bit = divmod(matcher.forced[0], 32)
                bits[row, word] = np.uint32(1 << bit).astype(np.int32)
            else:
                free.append((matcher.state, row))
        failed: dict[Sequence, StructuredOutputError] = {}
        if free:
            from llguidance.numpy import fill_next_token_bitmask_par

            fill_next_token_bitmask_par(self._executor, free, bits)
            bits &= sets[0].usable
        for _, row in free:
            matcher = matchers[row]
            assert matcher is not None
            try:
                matcher.check()
            except StructuredOutputError as error:
                failed[sequences[row]] = error
            if matcher.may_end:
                bits[row] |= sets[0].ends
        return bits, failed

    @cached_property
    def _executor(self) -> "LLExecutor":
        from llguidance import LLExecutor

        return LLExecutor(num_threads=max(1, min(_MOST_THREADS, os.cpu_count() or 1)))
