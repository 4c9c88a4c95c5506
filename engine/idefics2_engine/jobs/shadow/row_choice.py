"""Which rows of a job are chosen: those with the lowest of random numbers that depend on their ids.

The choice depends on the ids and the job's seed alone, so it is the same after a kill and with any
number of workers, in whatever order the rows finish.
"""

import heapq
import json
from dataclasses import dataclass
from hashlib import blake2b

from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.shadow.shadow_size import ShadowSize


@dataclass(eq=False)
class ChosenRow:
    """An answered row that may be chosen.

    Attributes:
        rank: Its number in [0, 1).
        row: The row.
        answers: Token ids of its answers.
        agreement: What was found. ``None`` if it was not compared yet.
    """

    rank: float
    row: JobRow
    answers: tuple[tuple[int, ...], ...]
    agreement: TokenAgreement | None = None

    def __lt__(self, other: "ChosenRow") -> bool:
        """Return whether a heap has this row in front, which is the one that is dropped first."""
        return (self.rank, self.row.index) > (other.rank, other.row.index)


def row_rank(seed: int, id: str | int) -> float:
    """Return a number in [0, 1) that depends only on the job's seed and the row's id."""
    text = json.dumps([seed, id]).encode()
    # Other numbers than those that become seeds of rows
    digest = blake2b(text, digest_size=6, person=b"shadow").digest()
    return int.from_bytes(digest, "big") / (1 << 48)


class RowChoice:
    """The rows with the lowest ranks of those that were offered, as many as ``size`` says.

    If a share of the rows was asked for and no rank is so low, the row with the lowest is chosen.
    """

    def __init__(self, size: ShadowSize, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._heap: list[ChosenRow] = []
        self._lowest = 1.0

    def may_take(self, row: JobRow) -> float | None:
        """Return the rank of a row that belongs to those chosen so far, ``None`` of another one."""
        rank = row_rank(self._seed, row.id)
        if rank >= self._size.share and rank >= self._lowest:
            return None
        is_full = len(self._heap) == self._size.rows
        return None if is_full and rank >= self._heap[0].rank else rank

    def take(self, chosen: ChosenRow) -> None:
        """Add a row of which ``may_take`` gave the rank."""
        self._lowest = min(self._lowest, chosen.rank)
        heapq.heappush(self._heap, chosen)
        if len(self._heap) > self._size.rows:
            heapq.heappop(self._heap)

    def rows(self) -> list[ChosenRow]:
        """Return the chosen rows, that with the lowest rank first."""
        found = sorted(self._heap, reverse=True)
        return [one for one in found if one.rank < self._size.share] or found[:1]
