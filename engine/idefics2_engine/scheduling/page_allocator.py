"""Which pages of the KV cache are free, shared, or free but known; host only."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NO_PAGE = -1
"""Stands in a sequence's list for a page that it has let go, behind its window."""


class PageAllocator:
    """Hands out page numbers and counts who holds each.

    A page whose content has a name (``remember``) keeps it when its last holder lets go: until
    somebody needs the room, it can be found again. Room is taken from nameless pages first, then
    from the one that was let go longest ago.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size  # tokens
        self._holders = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # the next to be taken first
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages ``num_tokens`` take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages of unknown content; there must be as many free."""
        assert count <= len(self._free)
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._forget(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold ``pages`` once more."""
        for page in pages:
            if page != NO_PAGE:
                self._free.pop(page, None)
                self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Release ``pages`` of a sequence, in its order; the last of them are reused first."""
        for page in reversed(pages):
            if page == NO_PAGE:
                continue
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._name_of:
                    self._free.move_to_end(page, last=False)

    def is_shared(self, page: int) -> bool:
        """Say whether ``page`` has more than one holder, so that nobody may write to it."""
        return self._holders[page] > 1

    def remember(self, page: int, name: bytes) -> None:
        """Name the content of ``page``, which must not change from now on.

        The first page of a name keeps it.
        """
        if name not in self._page_of:
            self._forget(page)
            self._page_of[name] = page
            self._name_of[page] = name

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the pages with these contents, as far as each one is known."""
        found = []
        for name in names:
            if (page := self._page_of.get(name)) is None:
                break
            found.append(page)
        return found

    def forget(self, names: Iterable[bytes]) -> None:
        """Let no page with one of these contents be found again; their holders keep them."""
        for name in names:
            if (page := self._page_of.get(name)) is not None:
                self._forget(page)
                if page in self._free:
                    self._free.move_to_end(page, last=False)

    def num_idle(self, pages: Iterable[int]) -> int:
        """Count those of ``pages`` that nobody holds."""
        return sum(page in self._free for page in pages)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that holders are as ``held``, that other pages are free, and that names agree."""
        counts = Counter(page for pages in held for page in pages if page != NO_PAGE)
        assert [counts[page] for page in range(self.num_pages)] == self._holders
        assert sorted(self._free) == [page for page in range(self.num_pages) if not counts[page]]
        assert {name: page for page, name in self._name_of.items()} == self._page_of

    def _forget(self, page: int) -> None:
        name = self._name_of.pop(page, None)
        if name is not None:
            del self._page_of[name]
