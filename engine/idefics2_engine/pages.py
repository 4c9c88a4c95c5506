"""Which pages of the KV cache are free; host only."""


class PageAllocator:
    """Hands out page numbers, each to one holder at a time."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size  # tokens
        self._free = list(range(num_pages - 1, -1, -1))

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages ``num_tokens`` take."""
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Say whether there are pages for ``num_tokens``."""
        return self.pages_for(num_tokens) <= len(self._free)

    def allocate(self, num_tokens: int) -> list[int]:
        """Take pages for ``num_tokens``; ``can_allocate`` must hold."""
        assert self.can_allocate(num_tokens)
        return [self._free.pop() for _ in range(self.pages_for(num_tokens))]

    def free(self, pages: list[int]) -> None:
        """Give ``pages`` back."""
        self._free.extend(reversed(pages))

    def check_integrity(self, held: list[list[int]]) -> None:
        """Assert that free pages and those ``held`` by sequences are every page once."""
        pages = [page for pages in held for page in pages] + self._free
        assert sorted(pages) == list(range(self.num_pages))
