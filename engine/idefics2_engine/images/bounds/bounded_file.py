"""A file in memory for Pillow, with a bound on the number of reads.

Pillow's plugins loop over markers, chunks, blocks, tags and strips in Python, with at least one
read for each. The number of reads therefore bounds their work in every format.
"""

import io

from idefics2_engine.errors import ImageError

# Pillow's loops over single bytes make so many reads in less than 0.1 s. Ordinary files need some
# hundreds.
_READS = 1 << 14


class BoundedFile(io.BytesIO):
    """A file in memory that raises ``ImageError`` when it is read too often."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name = name
        self._most = self._left = _READS

    def allow(self, reads: int) -> None:
        """Permit further ``reads``, once the size of the image is known."""
        self._most += reads
        self._left += reads

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes, or all that are left if ``size`` is negative or ``None``.

        Raises:
            ImageError: The file was read more often than permitted.
        """
        self._left -= 1
        if self._left < 0:
            raise ImageError(
                f"{self._name}: must be read in at most {self._most} steps at its size, got more "
                "(markers, chunks, blocks, tags or strips)"
            )
        return super().read(size)
