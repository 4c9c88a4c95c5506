"""The append-only journal of a job's finished rows, in segments.

A row is written once with one call, so a killed process loses no row that was appended. What was
synced survives a loss of power as well.
"""

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.file_operations import (
    APPEND,
    CREATE,
    READ,
    FileOperations,
    write_all,
)
from idefics2_engine.jobs.store.journal_index import JournalIndex
from idefics2_engine.jobs.store.journal_record import (
    check_key,
    decode_record,
    encode_record,
    find_record,
)

SEGMENT_BYTES = 64 << 20
SYNC_BYTES = 4 << 20
SYNC_SECONDS = 1.0

_SEGMENT_NAME = re.compile(r"journal-(\d{5,})\.jsonl")


class Recovery(NamedTuple):
    """What was found on start: good records, damaged lines, and bytes of an unfinished line."""

    records: int
    damaged: int
    cut_bytes: int


class Journal:
    """Appends records and finds them again.

    It is used by one thread. Other threads may call ``find``.

    Args:
        folder: The folder of the segments, which exists.
        files: Calls of the operating system.
        clock: Seconds that only grow. If they do not, the next record is synced at once.
        segment_bytes: A segment that has so many bytes gets no more records.
        sync_bytes: Most bytes that are written and not synced.
        sync_seconds: Most seconds that a record is not synced, if ``tick`` is called as often.

    Attributes:
        recovered: What was found on start.

    Raises:
        OSError: A segment cannot be read or cut.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: FileOperations | None = None,
        clock: Callable[[], float] = time.monotonic,
        segment_bytes: int = SEGMENT_BYTES,
        sync_bytes: int = SYNC_BYTES,
        sync_seconds: float = SYNC_SECONDS,
    ) -> None:
        self._folder = folder
        self._files = files or FileOperations()
        self._clock = clock
        self._segment_bytes = segment_bytes
        self._sync_bytes = sync_bytes
        self._sync_seconds = sync_seconds
        self._index = JournalIndex()
        self._unsynced_bytes = 0
        self._unsynced_since = 0.0
        self._failure: OSError | None = None
        # The open segment; without one, the next record makes it
        self._fd: int | None = None
        self._size = 0
        # The segment that was read last
        self._reader: tuple[int, int] | None = None

        segments = journal_segments(folder)
        damaged, tail = scan_segments(segments, self._files, self._index)
        self._segment = segments[-1][0] if segments else -1
        if segments:
            self._open_last(segments[-1][1], tail)
        self.recovered = Recovery(len(self._index), damaged, tail)

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the journal."""
        self.close()

    @property
    def num_rows(self) -> int:
        """Rows with at least one record."""
        return self._index.num_rows

    @property
    def first_missing(self) -> int:
        """The first row without a record. Those before it have one with any key."""
        return self._index.first_missing()

    def append(self, row: int, key: str, out: bytes) -> int:
        """Write the record of a finished row; return its number.

        Args:
            row: Place of the row among the job's rows, from 0.
            key: SHA-256 of the row's input.
            out: The row's output, a JSON object on one line.

        Raises:
            ValueError: An argument cannot be written.
            OSError: The record was not written, or written and not synced. After a failed sync, and
                if the part that was written cannot be cut, every later call fails as well.
        """
        record = encode_record(row, key, out)
        self._check_usable()
        if self._fd is None or self._size >= self._segment_bytes:
            self._next_segment()
        assert self._fd is not None
        # An interrupt from here on would leave a record that the index does not know
        self._failure = OSError(errno.EINTR, "a write was interrupted")
        try:
            write_all(self._files, self._fd, record)
        except OSError as error:
            self._failure = self._cut(error)
            raise
        number = self._index.add(row, check_key(key), self._segment, self._size, len(record))
        self._size += len(record)
        self._failure = None
        if not self._unsynced_bytes:
            self._unsynced_since = self._clock()
        self._unsynced_bytes += len(record)
        self.tick()
        return number

    def tick(self) -> None:
        """Sync if it is time; the thread that appends calls this while it waits for rows."""
        waited = self._clock() - self._unsynced_since
        is_late = not 0 <= waited < self._sync_seconds
        if self._unsynced_bytes and (is_late or self._unsynced_bytes >= self._sync_bytes):
            self.sync()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        self._check_usable()
        if self._fd is None or not self._unsynced_bytes:
            return
        try:
            self._files.sync(self._fd)
        except OSError as error:
            # The system may have dropped what it could not write, and the next call would succeed
            self._failure = error
            raise
        self._unsynced_bytes = 0

    def find(self, row: int, key: str) -> int | None:
        """Return the number of the newest record of ``row`` with ``key``, if there is one."""
        return self._index.find(row, check_key(key))

    def read(self, record: int, row: int) -> bytes:
        """Return the output in a record.

        Args:
            record: The number that ``append`` or ``find`` returned.
            row: The row that it must be of.

        Raises:
            JobError: The record has been damaged since it was found, or is another row's.
            OSError: It cannot be read.
        """
        segment, offset, length = self._index.place(record)
        line = self._files.read_at(self._reading(segment), length, offset)
        found = decode_record(line)
        if found is None or (found.row, found.start) != (row, 0):
            raise JobError(
                f"{segment_path(self._folder, segment)}: byte {offset} must be row {row} of the "
                "job, got something else; the next start computes this row again"
            )
        return found.out

    def close(self) -> None:
        """Sync and close the files. A second call does nothing."""
        try:
            if self._failure is None:
                self.sync()
        finally:
            if self._reader is not None:
                (_, fd), self._reader = self._reader, None
                self._files.close(fd)
            if self._fd is not None:
                fd, self._fd = self._fd, None
                self._files.close(fd)
            self._failure = self._failure or OSError(errno.EBADF, "the journal is closed")

    def _open_last(self, path: Path, tail: int) -> None:
        """Open the last segment and cut its last ``tail`` bytes."""
        self._fd = self._files.open(path, APPEND)
        try:
            self._size = self._files.size(self._fd) - tail
            if tail:
                self._files.truncate(self._fd, self._size)
            # A process that was killed may not have synced its records, and this one relies on them
            self._files.sync(self._fd)
            self._files.sync_folder(self._folder)
        except BaseException:
            self._files.close(self._fd)
            raise

    def _next_segment(self) -> None:
        """Sync and close the open segment, if there is one, and make the next one."""
        if self._fd is not None:
            self.sync()
            fd, self._fd = self._fd, None
            self._files.close(fd)
        path = segment_path(self._folder, self._segment + 1)
        self._fd = self._files.open(path, CREATE)
        self._segment += 1
        self._size = 0
        try:
            self._files.sync_folder(self._folder)
        except OSError as error:
            self._failure = error
            raise

    def _cut(self, error: OSError) -> OSError | None:
        """Remove the part of a record that was written before ``error``; return why it is there."""
        assert self._fd is not None
        try:
            self._files.truncate(self._fd, self._size)
        except OSError:
            # The next start cuts it. A record after it would be on the same line
            return error
        return None

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise OSError(
                self._failure.errno, f"the journal failed before: {self._failure.strerror}"
            ) from self._failure

    def _reading(self, segment: int) -> int:
        """Return a descriptor of ``segment`` for reading."""
        if segment == self._segment and self._fd is not None:
            return self._fd
        if self._reader is None or self._reader[0] != segment:
            if self._reader is not None:
                (_, fd), self._reader = self._reader, None
                self._files.close(fd)
            self._reader = segment, self._files.open(segment_path(self._folder, segment), READ)
        return self._reader[1]


def segment_path(folder: Path, segment: int) -> Path:
    """Return the path of a segment."""
    return folder / f"journal-{segment:05}.jsonl"


def journal_segments(folder: Path) -> list[tuple[int, Path]]:
    """Return number and path of each segment in ``folder``, in order."""
    named = ((_SEGMENT_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in named if name)


def scan_segments(
    segments: list[tuple[int, Path]], files: FileOperations, index: JournalIndex
) -> tuple[int, int]:
    """Add every good record to ``index``, without changing a file.

    Returns:
        The number of damaged lines, and the bytes of the unterminated last line.
    """
    damaged = tail = 0
    for place, (segment, path) in enumerate(segments):
        offset = 0
        for line in files.lines(path):
            # Its output is not copied, since a journal may have millions of lines
            record = find_record(line)
            if record is not None:
                start, length = offset + record.start, len(line) - record.start
                index.add(record.row, record.key, segment, start, length)
            # A record in front of which another one's damaged remains are
            if record is None or record.start:
                if line.endswith(b"\n") or place < len(segments) - 1:
                    damaged += 1
                else:
                    tail = len(line)
            offset += len(line)
    return damaged, tail
