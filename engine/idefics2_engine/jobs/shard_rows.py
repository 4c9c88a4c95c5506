"""The rows of a finished shard as JSON objects, in the order of its output."""

import os
from collections.abc import Iterator
from pathlib import Path

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.jobs.store.journal import journal_segments, scan_segments, segment_path
from idefics2_engine.jobs.store.journal_index import JournalIndex
from idefics2_engine.jobs.store.journal_record import decode_record
from idefics2_engine.model_files import printable_path


def output_rows(out: Path) -> Iterator[bytes]:
    """Yield the rows of an output that has a row in each line, as the journal has them.

    Raises:
        OSError: It cannot be read.
    """
    with open(out, "rb") as lines:
        for line in lines:
            yield line.removesuffix(b"\n")


def journal_rows(out: Path, num_rows: int) -> Iterator[bytes]:
    """Yield the rows of an output in any format, from the journal of its job.

    The journal keeps the answers to earlier versions of a row, and only the input tells which
    version counts. Such a journal is refused.

    Raises:
        JobError: A row is missing or damaged, or has several versions.
        OSError: The journal cannot be read.
    """
    folder = job_path(out)
    index = JournalIndex()
    scan_segments(journal_segments(folder), FileOperations(), index)
    open_segment, fd = -1, -1
    try:
        for row in range(num_rows):
            records = index.records(row)
            if not records:
                raise JobError(f"{printable_path(folder)}: row {row} must be there, got none")
            if len({index.half_key(record) for record in records}) > 1:
                raise JobError(
                    f"{printable_path(folder)}: row {row} must have one version, got answers to "
                    "several versions of its input; run this shard again with --restart"
                )
            segment, offset, length = index.place(records[0])
            if segment != open_segment:
                if fd >= 0:
                    os.close(fd)
                fd = os.open(segment_path(folder, segment), os.O_RDONLY)
                open_segment = segment
            found = decode_record(os.pread(fd, length, offset))
            if found is None or found.row != row:
                raise JobError(f"{printable_path(folder)}: row {row} is damaged")
            yield found.out
    finally:
        if fd >= 0:
            os.close(fd)
