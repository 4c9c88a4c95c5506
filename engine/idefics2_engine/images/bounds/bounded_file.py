"""The bytes of a file for Pillow, with a bound on how often they are read.

Pillow's plugins walk over markers, chunks, blocks, tags and strips in Python, with a read or more
for each. A count of reads therefore bounds their work, whatever the format and wherever the loop
is.
"""

import io

from idefics2_engine.errors import ImageError

# Below 0.1 s of Pillow's loops over single bytes. Ordinary files need some hundreds.
_READS = 1 << 14


class BoundedFile(io.BytesIO):
    """A file in memory that raises ``ImageError`` when it is read too often."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name = name
        self._most = self._left = _READS

    def allow(self, reads: int) -> None:
        """Permit further reads, for an image whose size is known by now."""
        self._most += reads
        self._left += reads

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes.

        Raises:
            ImageError: The file has more parts than an image of its size needs.
        """
        self._left -= 1
        if self._left < 0:
            raise ImageError(
                f"{self._name}: must be read in at most {self._most} steps at its size, got more "
                "(markers, chunks, blocks, tags or strips)"
            )
        return super().read(size)
