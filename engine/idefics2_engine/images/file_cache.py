"""Tiles of image files that were seen, found by the bytes of the file before it is decoded."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from hashlib import blake2b

from idefics2_engine.images.file_tiles import FileTiles, PillowSwitches, TileRules

CACHE_BYTES = 256 << 20
# Another thread that decodes the same file is waited for at most so long, in seconds
_PATIENCE = 5.0

Key = tuple[bytes, TileRules, PillowSwitches]


class FileCache:
    """The tiles of recent files, as many as have ``max_bytes`` of pixels. It is thread-safe.

    Attributes:
        hits: Files that were found.
        decoded: Files that were decoded, without those that could not be.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.decoded = 0
        # The least recently used first
        self._files: OrderedDict[Key, FileTiles] = OrderedDict()
        self._num_bytes = 0
        self._pending: dict[Key, Future[FileTiles | None]] = {}
        # It is held for a few instructions. Nothing waits with it
        self._lock = threading.Lock()

    def get(self, data: bytes, rules: TileRules, decode: Callable[[], FileTiles]) -> FileTiles:
        """Return the tiles of a file; ``decode`` makes them if it was not seen.

        A file that another thread is decoding is waited for. Only files without an error are kept.

        Raises:
            Exception: What ``decode`` raised.
        """
        key = blake2b(data, digest_size=16).digest(), rules, PillowSwitches.current()
        mine: Future[FileTiles | None] = Future()
        try:
            found = self._found(key, mine)
            if found is None:
                found = decode()
                self._keep(key, found)
                mine.set_result(found)
            return found
        finally:
            # Also after an interrupt, so that nobody waits for what will not come
            with self._lock:
                if self._pending.get(key) is mine:
                    del self._pending[key]
            if not mine.done():
                mine.set_result(None)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._files.clear()
            self._num_bytes = 0

    def _found(self, key: Key, mine: "Future[FileTiles | None]") -> FileTiles | None:
        """Return the tiles of a file; ``None`` if the caller must decode it."""
        with self._lock:
            found = self._files.get(key)
            if found is not None:
                self._files.move_to_end(key)
                self.hits += 1
                return found
            other = self._pending.setdefault(key, mine)
        if other is not mine:
            try:
                found = other.result(_PATIENCE)
            except TimeoutError:
                found = None
        if found is not None:
            with self._lock:
                self.hits += 1
        return found

    def _keep(self, key: Key, made: FileTiles) -> None:
        size = made.num_bytes
        with self._lock:
            self.decoded += 1
            if size > self.max_bytes or key in self._files:
                return
            self._files[key] = made
            self._num_bytes += size
            while self._num_bytes > self.max_bytes:
                _, oldest = self._files.popitem(last=False)
                self._num_bytes -= oldest.num_bytes
