"""Which images' embeddings are kept, and in which entry; host only.

The embeddings themselves are the runner's. An entry that somebody holds stays; others are given to
new images, the one that was let go longest ago first.
"""

from collections import OrderedDict
from collections.abc import Iterable


class EncoderCache:
    """Entries by content: the fingerprint of a tile."""

    def __init__(self, num_entries: int) -> None:
        self.num_entries = num_entries
        self._entry_of: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # known and not held, oldest first
        self._empty = list(range(num_entries - 1, -1, -1))

    def __contains__(self, content: bytes) -> bool:
        """Say whether the embeddings are there, or will be after the step that computes them."""
        return content in self._entry_of

    @property
    def num_available(self) -> int:
        """Entries that a new image could have."""
        return len(self._empty) + len(self._idle)

    def is_held(self, content: bytes) -> bool:
        """Say whether somebody holds an image."""
        return content in self._holders

    def entry(self, content: bytes) -> int:
        """Return where a known image's embeddings are."""
        return self._entry_of[content]

    def hold(self, content: bytes) -> None:
        """Hold an image's entry; a new image gets one, of which there must be one available."""
        if content in self._entry_of:
            self._idle.pop(content, None)
        else:
            if not self._empty:
                oldest, _ = self._idle.popitem(last=False)
                self._empty.append(self._entry_of.pop(oldest))
            self._entry_of[content] = self._empty.pop()
        self._holders[content] = self._holders.get(content, 0) + 1

    def release(self, content: bytes) -> None:
        """Let go of an image once; it stays known until its entry is needed."""
        self._holders[content] -= 1
        if self._holders[content] == 0:
            del self._holders[content]
            self._idle[content] = None

    def forget(self, contents: Iterable[bytes]) -> None:
        """Drop those images that are known and not held."""
        for content in contents:
            if content in self._idle:
                del self._idle[content]
                self._empty.append(self._entry_of.pop(content))

    def forget_idle(self) -> None:
        """Drop all that nobody holds, as when contents are no longer to be trusted."""
        self.forget([*self._idle])

    def check_integrity(self, held: list[bytes]) -> None:
        """Assert that holders are as ``held``, and that every entry is one image's or empty."""
        assert {content: held.count(content) for content in held} == self._holders
        assert not self._holders.keys() & self._idle.keys()
        assert self._entry_of.keys() == self._holders.keys() | self._idle.keys()
        assert sorted([*self._entry_of.values(), *self._empty]) == list(range(self.num_entries))
