"""Items that wait, first come first served, unless long ones may overtake; host only."""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item", bound=Hashable)


class _Ticket(NamedTuple):
    """Sorts longer items first, then earlier ones."""

    negative_length: int
    number: int
    num_taken: int


class WaitingQueue(Generic[Item]):
    """A queue in which items that may be overtaken are ordered by length, the longest first.

    If long answers begin first, short ones fill the gaps at the end of a job. If an item waits that
    may not be overtaken, the queue is first come, first served. Every operation takes constant or
    logarithmic time.

    Args:
        patience: An item is next after so many others were taken since it was added, if it is the
            oldest.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        # An ordered dict keeps the order and removes any item in constant time. Items that may not
        # be overtaken have no ticket
        self._tickets: OrderedDict[Item, _Ticket | None] = OrderedDict()
        # A removed item stays until it is the first or until half of the items were removed
        self._longest: list[tuple[_Ticket, Item]] = []
        self._num_fixed = 0
        self._num_added = 0
        self._num_taken = 0

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._tickets)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the items, the oldest first."""
        return iter(self._tickets)

    def __contains__(self, item: Item) -> bool:
        """Return whether ``item`` waits."""
        return item in self._tickets

    @property
    def is_fixed(self) -> bool:
        """Whether an item waits that may not be overtaken."""
        return self._num_fixed > 0

    def add(self, item: Item, length: int | None = None) -> None:
        """Append ``item``, which longer ones may overtake if its ``length`` is given."""
        ticket = None
        if length is None:
            self._num_fixed += 1
        else:
            self._num_added += 1
            ticket = _Ticket(-length, self._num_added, self._num_taken)
            heappush(self._longest, (ticket, item))
        self._tickets[item] = ticket

    def add_first(self, item: Item) -> None:
        """Put ``item`` before all others."""
        self.add(item)
        self._tickets.move_to_end(item, last=False)

    def next(self, skip: Collection[Item] = ()) -> Item | None:
        """Return the next item, which stays in the queue.

        Items of ``skip`` are passed over, unless the queue is first come, first served. ``None`` if
        there is no other item.
        """
        if not self._tickets:
            return None
        oldest, ticket = next(iter(self._tickets.items()))
        is_patient = ticket is not None and self._num_taken - ticket.num_taken < self.patience
        if oldest not in skip and (self.is_fixed or not is_patient):
            return oldest
        return None if self.is_fixed else self._next_longest(skip)

    def _next_longest(self, skip: Collection[Item]) -> Item | None:
        skipped, found = [], None
        while found is None and self._longest:
            ticket, item = self._longest[0]
            if self._tickets.get(item) is not ticket:
                heappop(self._longest)
            elif item in skip:
                skipped.append(heappop(self._longest))
            else:
                found = item
        for entry in skipped:
            heappush(self._longest, entry)
        return found

    def take(self, item: Item) -> None:
        """Remove ``item``, which is admitted."""
        self.remove(item)
        self._num_taken += 1

    def remove(self, item: Item) -> None:
        """Remove ``item`` if it waits."""
        if item not in self._tickets:
            return
        self._num_fixed -= self._tickets.pop(item) is None
        if len(self._longest) > 2 * len(self._tickets):
            self._longest = [(t, one) for t, one in self._longest if self._tickets.get(one) is t]
            heapify(self._longest)
