"""The ordered writer: order, what waits in memory, and what it refuses."""

import errno
import hashlib
import random
from pathlib import Path

import pytest

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.job_outputs import WrittenOutput
from idefics2_engine.jobs.writers.ordered_writer import OrderedWriter
from job_files import CountedFiles, FailingFiles, ShortFiles


class Records:
    """A journal in memory, in which the number of a record is its row's number plus 5."""

    def __init__(self) -> None:
        self.read_rows: list[int] = []

    def read(self, record: int, row: int) -> bytes:
        assert record == row + 5
        self.read_rows.append(row)
        return row_of(row)


def row_of(row: int) -> bytes:
    return b'{"row":%d}' % row


def lines(num_rows: int) -> bytes:
    return b"".join(row_of(row) + b"\n" for row in range(num_rows))


def test_rows_are_written_in_order(tmp_path: Path) -> None:
    path, records = tmp_path / "out.partial", Records()
    path.write_bytes(b"of an earlier run")
    writer = OrderedWriter(path, records, window=10)
    rows = list(range(300))
    random.Random(0).shuffle(rows)
    for row in rows:
        writer.finish_row(row, row + 5, row_of(row))
        assert writer.num_in_memory <= 10
    assert writer.next_row == 300
    output = writer.complete(300)
    content = path.read_bytes()
    assert content == lines(300)
    assert output == WrittenOutput(300, len(content), hashlib.sha256(content).hexdigest())
    # A row is read once, and one that was in memory is not
    assert len(set(records.read_rows)) == len(records.read_rows) < 300


def test_rows_behind_a_straggler_wait_in_the_journal(tmp_path: Path) -> None:
    records = Records()
    writer = OrderedWriter(tmp_path / "out.partial", records, window=4)
    for row in range(1, 1000):
        writer.finish_row(row, row + 5, row_of(row))
    assert writer.next_row == 0
    assert writer.num_in_memory == 3
    writer.finish_row(0, 5, row_of(0))
    assert writer.num_in_memory == 0
    assert records.read_rows == list(range(4, 1000))
    writer.complete(1000)
    assert (tmp_path / "out.partial").read_bytes() == lines(1000)


def test_rows_of_an_earlier_run_are_read_in_turn(tmp_path: Path) -> None:
    records = Records()
    writer = OrderedWriter(tmp_path / "out.partial", records, window=4)
    for row in (1, 2, 0):
        writer.finish_row(row, row + 5)
    assert records.read_rows == [0, 1, 2]
    writer.complete(3)


def test_no_rows_are_an_empty_file(tmp_path: Path) -> None:
    writer = OrderedWriter(tmp_path / "out.partial", Records(), window=4)
    assert writer.complete(0) == WrittenOutput(0, 0, hashlib.sha256().hexdigest())
    assert (tmp_path / "out.partial").read_bytes() == b""


def test_row_is_finished_once(tmp_path: Path) -> None:
    writer = OrderedWriter(tmp_path / "out.partial", Records(), window=4)
    for row in (0, 2):
        writer.finish_row(row, row + 5, row_of(row))
        with pytest.raises(ValueError, match=f"row {row} must be finished once"):
            writer.finish_row(row, row + 5, row_of(row))
    writer.close()


@pytest.mark.parametrize(
    ("finished", "num_rows"), [([0, 1], 3), ([0, 1], 1), ([0, 2], 3), ([0, 2], 2), ([0, 2], 1)]
)
def test_output_with_missing_or_more_rows_is_not_complete(
    finished: list[int], num_rows: int, tmp_path: Path
) -> None:
    writer = OrderedWriter(tmp_path / "out.partial", Records(), window=4)
    for row in finished:
        writer.finish_row(row, row + 5, row_of(row))
    with pytest.raises(ValueError, match=f"{num_rows} rows must be written"):
        writer.complete(num_rows)
    writer.close()


def test_file_is_synced_when_it_is_complete(tmp_path: Path) -> None:
    files = CountedFiles()
    writer = OrderedWriter(tmp_path / "out.partial", Records(), window=4, files=files)
    writer.finish_row(0, 5, row_of(0))
    writer.complete(1)
    assert files.calls == ["open", "write", "sync"]


def test_short_writes_are_continued(tmp_path: Path) -> None:
    writer = OrderedWriter(tmp_path / "out.partial", Records(), window=4, files=ShortFiles(3))
    for row in range(5):
        writer.finish_row(row, row + 5, row_of(row))
    writer.complete(5)
    assert (tmp_path / "out.partial").read_bytes() == lines(5)


@pytest.mark.parametrize("call", [1, 2])
def test_file_that_failed_cannot_be_completed(call: int, tmp_path: Path) -> None:
    files = FailingFiles(errno.EIO, range(call, call + 1))
    writer = OrderedWriter(tmp_path / "out.partial", Records(), window=4, files=files)
    writer.finish_row(0, 5, row_of(0))
    with pytest.raises(OSError, match="Input/output"):
        writer.complete(1)
    with pytest.raises(ValueError, match="closed"):
        writer.complete(1)


def test_large_output_is_written_in_parts(tmp_path: Path) -> None:
    class Large:
        def read(self, record: int, row: int) -> bytes:
            return b'{"text":"%b"}' % (b"x" * 300_000)

    files = CountedFiles()
    writer = OrderedWriter(tmp_path / "out.partial", Large(), window=4, files=files)
    for row in range(9):
        writer.finish_row(row, row)
    assert files.calls.count("write") == 2
    writer.complete(9)
    assert files.calls.count("write") == 3
    assert (tmp_path / "out.partial").stat().st_size == 9 * 300_012


def test_damaged_record_is_passed_on(tmp_path: Path) -> None:
    class Damaged:
        def read(self, record: int, row: int) -> bytes:
            raise JobError(f"row {row}")

    writer = OrderedWriter(tmp_path / "out.partial", Damaged(), window=4)
    with pytest.raises(JobError, match="row 0"):
        writer.finish_row(0, 0)
    writer.close()
