"""Allocation, sharing and reuse of the KV cache's pages, on the host only."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NO_PAGE = -1
"""Placeholder in a sequence's page list for a released page outside its window."""


def most_pages(length: int, page_size: int, window: int | None, step_tokens: int) -> int:
    """Return the most pages that a sequence of ``length`` tokens holds at a time.

    Args:
        length: Tokens of prompt and answer.
        page_size: Tokens of a page.
        window: Keys that a query attends to. All if ``None``.
        step_tokens: Most tokens of a step.
    """
    if window is not None:
        length = min(length, window + step_tokens + page_size)
    return -(-length // page_size)


class PageAllocator:
    """An allocator of page numbers with a reference count for each page.

    A page whose content has a name (``remember``) keeps the name after its last release. It can be
    found by that name until it is allocated again. Pages without a name are allocated first, then
    the least recently released.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size  # tokens
        self._holders = [0] * num_pages
        # The first page is allocated next
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Number of pages without a holder."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages ``num_tokens`` need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Allocate ``count`` pages of undefined content; as many must be free."""
        assert count <= len(self._free)
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._forget(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to ``pages``."""
        for page in pages:
            if page != NO_PAGE:
                self._free.pop(page, None)
                self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Release ``pages`` in the order of their sequence; the last ones are reused first."""
        for page in reversed(pages):
            if page == NO_PAGE:
                continue
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._name_of:
                    self._free.move_to_end(page, last=False)

    def is_shared(self, page: int) -> bool:
        """Return whether ``page`` has several holders and must not be written to."""
        return self._holders[page] > 1

    def remember(self, page: int, name: bytes) -> None:
        """Name the content of ``page``, which must not change anymore.

        If another page already has the name, nothing changes.
        """
        if name not in self._page_of:
            self._forget(page)
            self._page_of[name] = page
            self._name_of[page] = name

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the pages with these names, up to the first unknown name."""
        found = []
        for name in names:
            if (page := self._page_of.get(name)) is None:
                break
            found.append(page)
        return found

    def forget(self, names: Iterable[bytes]) -> None:
        """Remove ``names``, so that their pages cannot be found; holders keep the pages."""
        for name in names:
            if (page := self._page_of.get(name)) is not None:
                self._forget(page)
                if page in self._free:
                    self._free.move_to_end(page, last=False)

    def num_idle(self, pages: Iterable[int]) -> int:
        """Count those of ``pages`` that have no holder."""
        return sum(page in self._free for page in pages)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that holders match ``held``, other pages are free, and names are consistent."""
        counts = Counter(page for pages in held for page in pages if page != NO_PAGE)
        assert [counts[page] for page in range(self.num_pages)] == self._holders
        assert sorted(self._free) == [page for page in range(self.num_pages) if not counts[page]]
        assert {name: page for page, name in self._name_of.items()} == self._page_of

    def _forget(self, page: int) -> None:
        name = self._name_of.pop(page, None)
        if name is not None:
            del self._page_of[name]
