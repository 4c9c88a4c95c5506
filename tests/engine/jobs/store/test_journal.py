"""The journal: what is found again after damage, when it is synced, and its size in memory."""

import errno
import json
import random
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import pytest

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store import journal_record
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.journal import SEGMENT_BYTES, Journal, Recovery, segment_path
from idefics2_engine.jobs.store.journal_index import JournalIndex
from idefics2_engine.jobs.store.journal_record import decode_record, encode_record
from job_files import CountedFiles, FailingFiles, Killed, KilledFiles, ShortFiles
from stand_in_job import answer, row_key

ROWS = [f"row {number} é \ud800 {{" for number in range(500)]
KEYS = [row_key(row) for row in ROWS]
OUTS = [answer(number, row) for number, row in enumerate(ROWS)]
RECORDS = [encode_record(number, KEYS[number], out) for number, out in enumerate(OUTS)]
# An output that contains a whole record, as text and as an object
NESTED = encode_row({"text": RECORDS[3].decode(), "keep": json.loads(RECORDS[3])})


def fill(folder: Path, numbers: range, segment_bytes: int = SEGMENT_BYTES) -> None:
    with Journal(folder, files=CountedFiles(), segment_bytes=segment_bytes) as journal:
        for number in numbers:
            journal.append(number, KEYS[number], OUTS[number])


def found_in(folder: Path, numbers: range) -> tuple[dict[int, bytes], Recovery]:
    with Journal(folder, files=CountedFiles()) as journal:
        records = {number: journal.find(number, KEYS[number]) for number in numbers}
        outs = {
            number: journal.read(record, number)
            for number, record in records.items()
            if record is not None
        }
        return outs, journal.recovered


def test_record_is_one_line_with_the_sum_of_what_is_before_it() -> None:
    line = encode_record(17, KEYS[0], b'{"text":"x"}')
    body, _, end = line.rpartition(b',"crc":"')
    assert body == b'{"v":1,"row":17,"key":"%b","out":{"text":"x"}' % KEYS[0].encode()
    assert end == b'%08x"}\n' % zlib.crc32(body)
    assert json.loads(line)["out"] == {"text": "x"}


@pytest.mark.parametrize(
    ("row", "key", "out", "message"),
    [
        (-1, KEYS[0], b"{}", "row must be from 0"),
        (2**32 - 1, KEYS[0], b"{}", "row must be from 0"),
        (0, KEYS[0].upper(), b"{}", "key must have 64"),
        (0, KEYS[0] + "\n", b"{}", "key must have 64"),
        (0, KEYS[0], b"{}\n", "out must be"),
        (0, KEYS[0], b"[]", "out must be"),
    ],
)
def test_bad_record_is_refused_before_it_is_written(
    row: int, key: str, out: bytes, message: str, tmp_path: Path
) -> None:
    with Journal(tmp_path) as journal, pytest.raises(ValueError, match=message):
        journal.append(row, key, out)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_found_again_in_all_segments(tmp_path: Path) -> None:
    fill(tmp_path, range(0, 250), segment_bytes=1000)
    fill(tmp_path, range(250, 500), segment_bytes=1000)
    segments = sorted(path.name for path in tmp_path.iterdir())
    assert segments[:2] == ["journal-00000.jsonl", "journal-00001.jsonl"]
    assert len(segments) > 50
    outs, recovered = found_in(tmp_path, range(500))
    assert outs == dict(enumerate(OUTS))
    assert recovered == Recovery(500, 0, 0)


def test_newest_record_with_an_equal_key_is_found(tmp_path: Path) -> None:
    outs = [b'{"n":%d}' % number for number in range(4)]
    with Journal(tmp_path) as journal:
        for key, out in zip("abab", outs, strict=True):
            journal.append(7, row_key(key), out)
    for _ in range(2):
        with Journal(tmp_path) as journal:
            assert journal.num_rows == 1
            for key, number in (("a", 2), ("b", 3)):
                record = journal.find(7, row_key(key))
                assert record == number
                assert journal.read(record, 7) == outs[number]
            assert journal.find(7, row_key("c")) is None
            assert journal.find(6, row_key("a")) is None
            assert journal.find(8, row_key("a")) is None


def test_torn_tail_is_cut_at_every_byte(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    path = segment_path(tmp_path, 0)
    whole = path.read_bytes()
    for length in range(len(RECORDS[2])):
        path.write_bytes(whole[: len(whole) - len(RECORDS[2]) + length])
        outs, recovered = found_in(tmp_path, range(3))
        assert outs == {0: OUTS[0], 1: OUTS[1]}
        assert recovered == Recovery(2, 0, length)
        fill(tmp_path, range(2, 3))
        assert path.read_bytes() == whole


def test_record_after_a_tail_that_was_not_cut_is_not_read(tmp_path: Path) -> None:
    """The negative control of the cut."""

    class Uncut(FileOperations):
        def truncate(self, fd: int, num_bytes: int) -> None:
            pass

    fill(tmp_path, range(2))
    with segment_path(tmp_path, 0).open("ab") as file:
        file.write(RECORDS[2][:50])
    with Journal(tmp_path, files=Uncut()) as journal:
        record = journal.append(2, KEYS[2], OUTS[2])
        with pytest.raises(JobError, match="must be row 2"):
            journal.read(record, 2)


def rows_lost_by_flips(folder: Path) -> list[list[int]]:
    """Flip a bit of each record in turn, and return which rows are lost or wrong each time."""
    path = segment_path(folder, 0)
    path.write_bytes(whole := b"".join(RECORDS))
    rng = random.Random(0)
    lost = []
    start = 0
    for number, record in enumerate(RECORDS):
        # Every tenth is in the newline, which joins two lines
        place = len(record) - 1 if number % 10 == 0 else rng.randrange(len(record))
        near = range(max(0, number - 2), min(len(RECORDS), number + 3))
        flipped = bytearray(whole)
        flipped[start + place] ^= 1 << rng.randrange(8)
        start += len(record)
        # Lines far away are the same
        begin = sum(map(len, RECORDS[: near.start]))
        end = begin + sum(map(len, RECORDS[near.start : near.stop]))
        path.write_bytes(flipped[begin:end])
        outs, recovered = found_in(folder, near)
        lost.append([row for row in near if outs.get(row) != OUTS[row]])
        assert recovered.damaged or recovered.cut_bytes
    return lost


def test_flipped_bit_costs_its_row_alone(tmp_path: Path) -> None:
    assert rows_lost_by_flips(tmp_path) == [[number] for number in range(len(RECORDS))]


def test_flipped_bit_is_not_noticed_without_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: an output is wrong, and the damage is not counted."""
    monkeypatch.setattr(journal_record, "crc32", lambda data: 0)
    path = segment_path(tmp_path, 0)
    line = bytearray(encode_record(0, KEYS[0], OUTS[0]))
    line[-40] ^= 1
    path.write_bytes(line)
    outs, recovered = found_in(tmp_path, range(1))
    assert outs[0] != OUTS[0]
    assert recovered == Recovery(1, 0, 0)


def test_every_flip_of_one_record_costs_it_alone(tmp_path: Path) -> None:
    before, line, after = RECORDS[0], RECORDS[1], RECORDS[2]
    for place in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[place // 8] ^= 1 << place % 8
        content = before + flipped + after
        found = map(decode_record, BytesIO(content))
        assert [one.row for one in found if one] == [0, 2], place


def test_record_inside_of_an_output_is_not_one(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(9, KEYS[9], NESTED)
    outs, recovered = found_in(tmp_path, range(10))
    assert outs == {9: NESTED}
    assert recovered == Recovery(1, 0, 0)
    path = segment_path(tmp_path, 0)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert found_in(tmp_path, range(10)) == ({}, Recovery(0, 1, 0))


def test_row_beyond_the_index_is_damage(tmp_path: Path) -> None:
    body = b'{"v":1,"row":4294967295,"key":"%b","out":{}' % KEYS[0].encode()
    segment_path(tmp_path, 0).write_bytes(b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body)))
    assert found_in(tmp_path, range(1)) == ({}, Recovery(0, 1, 0))


def test_damage_since_the_start_is_an_error_of_its_row(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    with Journal(tmp_path) as journal:
        records = [journal.find(number, KEYS[number]) for number in range(2)]
        assert records == [0, 1]
        path = segment_path(tmp_path, 0)
        content = bytearray(path.read_bytes())
        content[len(RECORDS[0]) + 99] ^= 1
        path.write_bytes(content)
        assert journal.read(0, 0) == OUTS[0]
        with pytest.raises(JobError, match=r"journal-00000\.jsonl: byte \d+ must be row 1"):
            journal.read(1, 1)
        with pytest.raises(JobError, match="must be row 1"):
            journal.read(0, 1)


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_record_is_one_write_and_is_synced_in_time(tmp_path: Path) -> None:
    files, clock = CountedFiles(), Clock()
    journal = Journal(tmp_path, files=files, clock=clock, sync_bytes=3 * len(RECORDS[0]))

    def append(number: int) -> list[str]:
        del files.calls[:]
        journal.append(number, KEYS[number], OUTS[number])
        return files.calls

    assert append(0) == ["open", "sync_folder", "write"]
    clock.now += 0.99
    assert append(1) == ["write"]
    clock.now += 0.02
    # The second begins with the first record that is not synced
    assert append(2) == ["write", "sync"]
    clock.now += 50
    assert append(3) == ["write"]
    clock.now += 1
    del files.calls[:]
    journal.tick()
    journal.tick()
    assert files.calls == ["sync"]
    assert append(4) == ["write"]
    clock.now -= 30
    # A clock that steps back
    assert append(5) == ["write", "sync"]
    assert append(6) == ["write"]
    assert append(7) == ["write"]
    # Three records have so many bytes
    assert append(8) == ["write", "sync"]
    assert append(9) == ["write"]
    del files.calls[:]
    journal.close()
    journal.close()
    assert files.calls == ["sync"]


def test_segment_is_synced_before_the_next_is_made(tmp_path: Path) -> None:
    files = CountedFiles()
    with Journal(tmp_path, files=files, clock=lambda: 0.0, segment_bytes=1) as journal:
        journal.append(0, KEYS[0], OUTS[0])
        del files.calls[:]
        journal.append(1, KEYS[1], OUTS[1])
        assert files.calls == ["sync", "open", "sync_folder", "write"]
        assert journal.read(0, 0) == OUTS[0]
        assert journal.read(1, 1) == OUTS[1]


def test_short_writes_are_continued(tmp_path: Path) -> None:
    with Journal(tmp_path, files=ShortFiles(7)) as journal:
        journal.append(0, KEYS[0], OUTS[0])
    assert segment_path(tmp_path, 0).read_bytes() == RECORDS[0]


def test_write_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    files = ShortFiles(0)
    with Journal(tmp_path, files=files) as journal, pytest.raises(OSError, match="without writing"):
        journal.append(0, KEYS[0], OUTS[0])


def test_journal_continues_after_a_full_disk(tmp_path: Path) -> None:
    # Call 3 is the second record's write
    with Journal(tmp_path, files=FailingFiles(errno.ENOSPC, range(3, 4))) as journal:
        journal.append(0, KEYS[0], OUTS[0])
        with pytest.raises(OSError, match="No space left"):
            journal.append(1, KEYS[1], OUTS[1])
        assert journal.find(1, KEYS[1]) is None
        journal.append(1, KEYS[1], OUTS[1])
    assert segment_path(tmp_path, 0).read_bytes() == RECORDS[0] + RECORDS[1]


@pytest.mark.parametrize("last", [4, 5])
def test_journal_ends_when_the_part_of_a_record_stays(last: int, tmp_path: Path) -> None:
    # Calls 3 and 4 are the write and the cut
    with Journal(tmp_path, files=FailingFiles(errno.EIO, range(3, last + 1))) as journal:
        journal.append(0, KEYS[0], OUTS[0])
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                journal.append(1, KEYS[1], OUTS[1])
    assert found_in(tmp_path, range(2)) == (
        {0: OUTS[0]},
        Recovery(1, 0, len(RECORDS[1]) // 2),
    )


def test_journal_ends_after_a_failed_sync(tmp_path: Path) -> None:
    files = FailingFiles(errno.EIO, range(3, 4))
    with Journal(tmp_path, files=files, sync_bytes=1) as journal:
        with pytest.raises(OSError, match="Input/output error"):
            journal.append(0, KEYS[0], OUTS[0])
        # The system would say that the next one succeeds
        with pytest.raises(OSError, match="failed before: Input/output error"):
            journal.sync()
        with pytest.raises(OSError, match="failed before"):
            journal.append(1, KEYS[1], OUTS[1])
    assert files.calls.count("write") == 1


def test_journal_ends_after_an_interrupted_write(tmp_path: Path) -> None:
    class Interrupted(FileOperations):
        def write(self, fd: int, data: memoryview) -> int:
            super().write(fd, data)
            raise KeyboardInterrupt

    journal = Journal(tmp_path, files=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        journal.append(0, KEYS[0], OUTS[0])
    with pytest.raises(OSError, match="interrupted"):
        journal.append(1, KEYS[1], OUTS[1])
    journal.close()
    assert found_in(tmp_path, range(2))[0] == {0: OUTS[0]}


def test_closed_journal_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(0, KEYS[0], OUTS[0])
    journal.close()
    with pytest.raises(OSError, match="closed"):
        journal.append(1, KEYS[1], OUTS[1])


def test_damaged_segment_in_the_middle_keeps_its_bytes(tmp_path: Path) -> None:
    fill(tmp_path, range(3), segment_bytes=1)
    path = segment_path(tmp_path, 1)
    path.write_bytes(RECORDS[1][:-9])
    assert found_in(tmp_path, range(3)) == ({0: OUTS[0], 2: OUTS[2]}, Recovery(2, 1, 0))
    assert path.read_bytes() == RECORDS[1][:-9]


def test_unreadable_segment_is_an_error(tmp_path: Path) -> None:
    class Unreadable(FileOperations):
        def lines(self, path: Path) -> None:  # type: ignore[override]
            raise OSError(errno.EIO, "Input/output error")

    fill(tmp_path, range(1))
    with pytest.raises(OSError, match="Input/output"):
        Journal(tmp_path, files=Unreadable())


def test_index_has_less_than_50_bytes_a_row() -> None:
    rows = 100_000
    key = bytes.fromhex(KEYS[0])
    tracemalloc.start()
    try:
        index = JournalIndex()
        for row in range(rows):
            index.add(row, key, 3, row, 500)
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert index.place(rows - 1) == (3, rows - 1, 500)
    assert size < 50 * rows
    assert peak < 50 * rows


def test_start_that_is_killed_changes_nothing_else(tmp_path: Path) -> None:
    path = segment_path(tmp_path, 0)
    torn = RECORDS[0] + RECORDS[1] + RECORDS[2][:50]
    for at in range(4):
        path.write_bytes(torn)
        with pytest.raises(Killed):
            Journal(tmp_path, files=KilledFiles(at))
        assert path.read_bytes() in (torn, RECORDS[0] + RECORDS[1])
