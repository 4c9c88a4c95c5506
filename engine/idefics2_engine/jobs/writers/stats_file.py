"""``OUT.stats.jsonl``: a line of times for each row that was computed, in the order of finishing.

Its lines differ from run to run, so it is no part of the output, and nothing reads it again. A kill
may cost the last lines.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.store.file_operations import (
    APPEND,
    FileOperations,
    move_aside,
    write_all,
)
from idefics2_engine.jobs.writers.own_file import beside
from idefics2_engine.outputs import RequestOutput

_BUFFER_BYTES = 1 << 16


class StatsFile:
    """Appends lines to the statistics of a job.

    Args:
        out: The output.
        is_new: Whether the job begins. A file that is there is then moved aside, and otherwise
            continued.
        files: Calls of the operating system.
        clock: Seconds since 1970, of the line's writing.

    Attributes:
        moved: The new name of a file that was moved aside.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(
        self,
        out: Path,
        *,
        is_new: bool,
        files: FileOperations | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = files or FileOperations()
        self._clock = clock
        path = beside(out, "stats.jsonl")
        self.moved: Path | None = None
        if is_new and os.path.lexists(path):
            self.moved = move_aside(self._files, path)
        self._fd: int | None = self._files.open(path, APPEND | os.O_CREAT)
        size = self._files.size(self._fd)
        # A line that a kill cut off stays a line of its own
        is_cut = size > 0 and self._files.read_at(self._fd, 1, size - 1) != b"\n"
        self._buffer = bytearray(b"\n" if is_cut else b"")

    def add(
        self,
        row: JobRow,
        output: RequestOutput,
        *,
        attempts: int = 1,
        worker: int | str | None = None,
    ) -> None:
        """Add the line of a row.

        Args:
            row: The row.
            output: What the engine said.
            attempts: How often it was asked.
            worker: Which worker answered. ``None`` without workers.

        Raises:
            OSError: The file cannot be written.
        """
        begin = output.metrics.arrival_time
        first, end = output.metrics.first_token_time, output.metrics.finished_time
        self._buffer += encode_row(
            {
                "row": row.number,
                "id": row.id,
                "error": None if output.error is None else output.error.code,
                "time": round(self._clock(), 3),
                "first_token_seconds": None if first is None else first - begin,
                "seconds": None if end is None else end - begin,
                "prompt_tokens": len(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens,
                "completion_tokens": sum(len(one.token_ids) for one in output.outputs),
                "images": len(output.image_info),
                "patches": output.num_patches,
                "attempts": attempts,
                "worker": worker,
            }
        )
        self._buffer += b"\n"
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write all lines.

        Raises:
            OSError: The file cannot be written. It is closed, because what it has is not known.
        """
        if self._fd is None:
            return
        data, self._buffer = bytes(self._buffer), bytearray()
        try:
            write_all(self._files, self._fd, data)
        except BaseException:
            self._close()
            raise

    def close(self) -> None:
        """Write all lines and close the file; a second call does nothing."""
        try:
            self.flush()
        finally:
            self._close()

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._files.close(fd)
