"""The running sequences as arrays, one row each, which a step advances together; host only.

Python runs for a sequence when it is admitted, gets a page, may end, or asks for more than tokens.
Everything else is one array operation for all sequences.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from idefics2_engine.scheduling.page_allocator import NO_PAGE

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Owners = npt.NDArray[np.object_]

NO_TOKEN = -1
# Tokens of a row that its owner's list does not have yet
_RECENT = 64
# Owners with more end tokens are asked about every token
_END_TOKENS = 8
# A row without a sequence has this serial number
_NOBODY = -1


class Entry(NamedTuple):
    """A sequence at its admission.

    Attributes:
        num_prompt: Tokens of the prompt.
        num_known: Tokens that the host knows.
        num_pending: Tokens drawn on the device that the host has not read.
        max_length: Most tokens of prompt and answer.
        last_token: The last known token.
        end_tokens: Tokens that may end the answer.
        asks: Whether the sequence is asked about every token, not only about possible ends.
        record: Its sampling parameters.
    """

    num_prompt: int
    num_known: int
    num_pending: int
    max_length: int
    last_token: int
    end_tokens: Collection[int]
    asks: bool
    record: tuple[Any, ...]


class SequenceTable:
    """Rows of running sequences, their owners, and the order in which they run.

    A row belongs to a sequence from its admission until it ends or is preempted, and then to
    another one. Serial numbers tell them apart.

    Attributes:
        order: Rows in running order, the oldest first.
        owners: The sequences.
        serials: A number for each admission, never used again.
        records: Sampling parameters of the owners.
        num_prompt: Tokens of the prompt.
        num_known: Tokens that the host knows.
        num_pending: Tokens drawn on the device that the host has not read.
        num_computed: Tokens whose keys and values are in the KV cache.
        max_length: Most tokens of prompt and answer.
        last_token: The last known token.
        drawn_row: Row of the last step's draw that has the pending token.
        asks: Whether the owner is asked about every token, not only about possible ends.
        end_tokens: Tokens that may end the answer, ``NO_TOKEN`` after them.
        pages: Pages of the KV cache, ``NO_PAGE`` after ``num_pages`` and for released ones.
        num_pages: Pages that were allocated.
        num_named: Pages that have a name.
        num_behind: Pages that were released, because they are behind the window.
        room: Positions before this one can be written without another page or a copy of one.
    """

    def __init__(self, page_size: int, record: npt.DTypeLike) -> None:
        self.page_size = page_size
        self.order: Ints = np.zeros(0, np.int64)
        self.owners: Owners = np.zeros(0, object)
        self.records = np.zeros(0, record)
        self.serials = _numbers()
        self.num_prompt = _numbers()
        self.num_known = _numbers()
        self.num_pending = _numbers()
        self.num_computed = _numbers()
        self.max_length = _numbers()
        self.last_token = _numbers()
        self.drawn_row = _numbers()
        self.asks: Bools = np.zeros(0, np.bool_)
        self.end_tokens: Ints = np.zeros((0, _END_TOKENS), np.int64)
        self.pages: npt.NDArray[np.int32] = np.zeros((0, 1), np.int32)
        self.num_pages = _numbers()
        self.num_named = _numbers()
        self.num_behind = _numbers()
        self.room = _numbers()
        self._recent: npt.NDArray[np.int32] = np.zeros((0, _RECENT), np.int32)
        self._num_recent = _numbers()
        self._free: list[int] = []
        self._next_serial = 0

    def __len__(self) -> int:
        """Return the number of running sequences."""
        return len(self.order)

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, pending ones included."""
        return self.num_known + self.num_pending

    def add(self, owner: object, entry: Entry, after: int | None = None) -> int:
        """Give ``owner`` a row without pages, behind the row ``after`` or the last; return it."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        ends = [*entry.end_tokens]
        self.owners[row] = owner
        self.serials[row] = self._next_serial
        self._next_serial += 1
        self.records[row] = entry.record
        self.num_prompt[row] = entry.num_prompt
        self.num_known[row] = entry.num_known
        self.num_pending[row] = entry.num_pending
        self.max_length[row] = entry.max_length
        self.last_token[row] = entry.last_token
        self.asks[row] = entry.asks or len(ends) > _END_TOKENS
        self.end_tokens[row] = NO_TOKEN
        if len(ends) <= _END_TOKENS:
            self.end_tokens[row, : len(ends)] = sorted(ends)
        for counts in (self.num_computed, self.num_named, self.num_behind, self.room):
            counts[row] = 0
        self._num_recent[row] = 0
        at = len(self.order)
        if after is not None:
            at = int(np.flatnonzero(self.order == after)[0]) + 1
        self.order = np.insert(self.order, at, row)
        return row

    def remove(self, row: int) -> None:
        """Take the row from its owner."""
        self.order = self.order[self.order != row]
        self.owners[row] = None
        self.serials[row] = _NOBODY
        self.pages[row, : self.num_pages[row]] = NO_PAGE
        self.num_pages[row] = 0
        self._free.append(row)

    def moves_on(self, rows: Ints) -> Bools:
        """Return which of ``rows`` need nothing but the next token of their answer."""
        computed = self.num_computed[rows]
        needs_one: Bools = self.num_known[rows] + self.num_pending[rows] == computed + 1
        return needs_one & (computed >= self.num_prompt[rows]) & (computed < self.room[rows])

    def input_tokens(self, rows: Ints) -> Ints:
        """Return the last token of each row; -1 - r stands for row r of the last step's draw."""
        return np.where(
            self.num_pending[rows] > 0, -1 - self.drawn_row[rows], self.last_token[rows]
        )

    def block_table(self, rows: Ints) -> npt.NDArray[np.int32]:
        """Return the pages of ``rows`` (B, W), as wide as the row with most pages."""
        width = int(self.num_pages[rows].max(initial=0))
        return self.pages[rows, :width]

    def drew(self, rows: Ints) -> None:
        """Mark that the device draws a token for each of ``rows``, in this order."""
        self.num_pending[rows] += 1
        self.drawn_row[rows] = np.arange(len(rows))

    def append(self, rows: Ints, serials: Ints, token_ids: Ints, is_usable: Bools) -> Ints:
        """Append pending tokens to rows that cannot end by them and whose owners do not ask.

        Args:
            rows: Rows that drew a token.
            serials: Their serial numbers at that time.
            token_ids: The tokens.
            is_usable: Which of the tokens may be appended.

        Returns:
            Places in ``rows`` whose tokens were not appended, because the owner must be asked.
        """
        known = self.num_known[rows]
        quiet = (
            is_usable
            & (self.serials[rows] == serials)
            & (self.num_pending[rows] > 0)
            & ~self.asks[rows]
            # The time of the first token is kept
            & (known > self.num_prompt[rows])
            & (known + 1 < self.max_length[rows])
            & (self._num_recent[rows] < _RECENT)
            & (self.end_tokens[rows] != token_ids[:, None]).all(1)
        )
        rows, token_ids = rows[quiet], token_ids[quiet]
        self._recent[rows, self._num_recent[rows]] = token_ids
        self._num_recent[rows] += 1
        self.last_token[rows] = token_ids
        self.num_known[rows] += 1
        self.num_pending[rows] -= 1
        return np.flatnonzero(~quiet)

    def append_one(self, row: int, token_id: int) -> None:
        """Note that the owner of ``row``, which has no recent tokens, appended a token itself."""
        self.last_token[row] = token_id
        self.num_known[row] += 1
        self.num_pending[row] = max(0, self.num_pending[row] - 1)

    def recent(self, row: int) -> list[int]:
        """Return the tokens of ``row`` that its owner has not taken."""
        tokens: list[int] = self._recent[row, : self._num_recent[row]].tolist()
        return tokens

    def take_recent(self, row: int) -> list[int]:
        """Return these tokens and forget them, because the owner keeps them."""
        tokens = self.recent(row) if self._num_recent[row] else []
        self._num_recent[row] = 0
        return tokens

    def row_pages(self, row: int) -> list[int]:
        """Return the pages of ``row``."""
        pages: list[int] = self.pages[row, : self.num_pages[row]].tolist()
        return pages

    def add_pages(self, row: int, pages: Sequence[int]) -> None:
        """Append ``pages`` to those of ``row``."""
        begin = int(self.num_pages[row])
        end = begin + len(pages)
        width = self.pages.shape[1]
        if end > width:
            more = max(end, 2 * width) - width
            self.pages = np.pad(self.pages, ((0, 0), (0, more)), constant_values=NO_PAGE)
        self.pages[row, begin:end] = pages
        self.num_pages[row] = end

    def holds(self, row: int, owner: object, entry: Entry) -> bool:
        """Return whether ``row`` is as if ``owner`` had just been added with ``entry``."""
        ends = sorted(entry.end_tokens)
        asks = entry.asks or len(ends) > _END_TOKENS
        padding = [NO_TOKEN] * (_END_TOKENS - len(ends))
        record = np.array(entry.record, self.records.dtype)
        return (
            self.owners[row] is owner
            and entry[:5] == tuple(int(getattr(self, name)[row]) for name in Entry._fields[:5])
            and self.asks[row] == asks
            and (len(ends) > _END_TOKENS or self.end_tokens[row].tolist() == [*ends, *padding])
            and self.records[row].tobytes() == record.tobytes()
        )

    def check_integrity(self) -> None:
        """Assert that every row is in the running order once or free."""
        assert sorted([*self.order.tolist(), *self._free]) == list(range(len(self.owners)))
        assert len({*self.serials[self.order].tolist()}) == len(self)
        free = np.array(self._free, np.int64)
        assert (self.serials[free] == _NOBODY).all()
        assert not any(owner is not None for owner in self.owners[free])
        behind = np.arange(self.pages.shape[1]) >= self.num_pages[:, None]
        assert (self.pages[behind] == NO_PAGE).all()
        assert (self.num_pages[free] == 0).all()
        assert (self.num_pages <= self.pages.shape[1]).all()

    def _grow(self) -> None:
        """Double the number of rows."""
        old = len(self.owners)
        more = max(8, old)
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray) and name != "order":
                new = np.zeros((more, *array.shape[1:]), array.dtype)
                setattr(self, name, np.concatenate([array, new]))
        self.owners[old:] = None
        self.serials[old:] = _NOBODY
        self.pages[old:] = NO_PAGE
        # Low rows are used first
        self._free += range(old + more - 1, old - 1, -1)


def _numbers() -> Ints:
    return np.zeros(0, np.int64)
