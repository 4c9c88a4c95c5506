"""Bookkeeping of cached image embeddings, on the host only.

The runner stores the embeddings. An entry with a holder is never evicted. Of the others, the least
recently released one is evicted first.
"""

from collections import OrderedDict
from collections.abc import Iterable


class EncoderCache:
    """Entries of the cache by content, which is the fingerprint of a tile."""

    def __init__(self, num_entries: int) -> None:
        self.num_entries = num_entries
        self._entry_of: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        # Cached contents without a holder, the least recently released first
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._empty = list(range(num_entries - 1, -1, -1))

    def __contains__(self, content: bytes) -> bool:
        """Return whether the embeddings are cached or will be after their step."""
        return content in self._entry_of

    @property
    def num_available(self) -> int:
        """Entries available to new images."""
        return len(self._empty) + len(self._idle)

    def is_held(self, content: bytes) -> bool:
        """Return whether an image has a holder."""
        return content in self._holders

    def entry(self, content: bytes) -> int:
        """Return the entry of a cached image."""
        return self._entry_of[content]

    def hold(self, content: bytes) -> None:
        """Hold an image's entry; a new image is assigned one, which must be available."""
        if content in self._entry_of:
            self._idle.pop(content, None)
        else:
            if not self._empty:
                oldest, _ = self._idle.popitem(last=False)
                self._empty.append(self._entry_of.pop(oldest))
            self._entry_of[content] = self._empty.pop()
        self._holders[content] = self._holders.get(content, 0) + 1

    def release(self, content: bytes) -> None:
        """Release one hold of an image, which stays cached until its entry is needed."""
        self._holders[content] -= 1
        if self._holders[content] == 0:
            del self._holders[content]
            self._idle[content] = None

    def forget(self, contents: Iterable[bytes]) -> None:
        """Evict those of ``contents`` that are cached and have no holder."""
        for content in contents:
            if content in self._idle:
                del self._idle[content]
                self._empty.append(self._entry_of.pop(content))

    def forget_idle(self) -> None:
        """Evict all images without a holder, for example after a failed step."""
        self.forget([*self._idle])

    def check_integrity(self, held: list[bytes]) -> None:
        """Assert that holders match ``held`` and that every entry has one image or is empty."""
        assert {content: held.count(content) for content in held} == self._holders
        assert not self._holders.keys() & self._idle.keys()
        assert self._entry_of.keys() == self._holders.keys() | self._idle.keys()
        assert sorted([*self._entry_of.values(), *self._empty]) == list(range(self.num_entries))
