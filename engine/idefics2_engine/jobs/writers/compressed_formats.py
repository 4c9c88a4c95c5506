r"""Rows as lines, each with ``\n``, in a compressed file.

The rows are compressed one after another in one stream, so its bytes depend on them alone.
"""

import zlib

from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.writers.output_file import OutputFile

# zlib's number for a gzip header, in which it writes no name and the time 0
_GZIP_WINDOW = 31
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3


class GzipFormat:
    """Lines in one gzip stream."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file
        self._stream = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)

    def write_row(self, row: bytes) -> None:
        """Write a row."""
        self._file.write(self._stream.compress(row + b"\n"))

    def finish(self) -> None:
        """Write the end of the stream."""
        self._file.write(self._stream.flush())


class ZstdFormat:
    """Lines in one Zstandard frame with a checksum.

    Raises:
        ConfigError: ``zstandard`` is not installed.
    """

    def __init__(self, file: OutputFile) -> None:
        zstandard = import_extra("zstandard", "parquet")
        self._file = file
        self._stream = zstandard.ZstdCompressor(_ZSTD_LEVEL, write_checksum=True).compressobj()

    def write_row(self, row: bytes) -> None:
        """Write a row."""
        self._file.write(self._stream.compress(row + b"\n"))

    def finish(self) -> None:
        """Write the end of the frame."""
        self._file.write(self._stream.flush())
