"""Rows are read lazily, within bounds of rows and of bytes."""

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event

from idefics2_engine.jobs.workers.leases import LeasedRow
from idefics2_engine.jobs.workers.read_ahead import ReadAhead
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Row

# Nothing here takes that long; a test that would wait for ever fails after it
SECONDS = 60.0
Got = SimpleQueue[LeasedRow | RequestOutput | None]


def reader(rows: Iterator[Row], ahead: int = 99, max_bytes: int = 1 << 20) -> tuple[ReadAhead, Got]:
    got: Got = SimpleQueue()
    made = ReadAhead(rows, got.put, ahead=ahead, max_bytes=max_bytes)
    made.start()
    return made, got


def leased(got: Got) -> LeasedRow:
    row = got.get(timeout=SECONDS)
    assert isinstance(row, LeasedRow)
    return row


def test_rows_ahead_are_bounded() -> None:
    asked: SimpleQueue[int] = SimpleQueue()

    def rows() -> Iterator[Row]:
        for number in range(5):
            asked.put(number)
            yield Row(number, "x")

    ahead, got = reader(rows(), ahead=2)
    for number in range(5):
        row = leased(got)
        assert row.number == number
        # The reading thread asks for a row when one before it is done, not earlier
        if number >= 1:
            assert asked.qsize() <= number + 1
            ahead.done(len(row.payload))
    assert got.get(timeout=SECONDS) is None
    assert ahead.has_ended
    assert ahead.count == 5


def test_bytes_ahead_are_bounded_and_one_row_always_may_be() -> None:
    read: list[int] = []

    def rows() -> Iterator[Row]:
        for number in range(6):
            read.append(number)
            yield Row(number, "x" * 1000)

    ahead, got = reader(rows(), max_bytes=10)
    for number in range(6):
        row = leased(got)
        assert read == list(range(number + 1))
        ahead.done(len(row.payload))
    assert got.get(timeout=SECONDS) is None


def test_drain_does_not_wait_for_the_source() -> None:
    waits, end = Event(), Event()

    def rows() -> Iterator[Row]:
        yield Row("a", "x")
        waits.set()
        end.wait(SECONDS)
        yield Row("b", "x")

    ahead, got = reader(rows())
    leased(got)
    assert waits.wait(SECONDS)
    ahead.drain()
    assert ahead.has_ended
    assert got.get(timeout=SECONDS) is None
    end.set()
    # The row that came later is dropped
    assert got.get(timeout=SECONDS) is None
    assert (ahead.count, ahead.error) == (1, None)


def test_error_of_the_source_ends_the_rows() -> None:
    def rows() -> Iterator[Row]:
        yield Row("a", "x")
        raise OSError("lost")

    ahead, got = reader(rows())
    leased(got)
    assert got.get(timeout=SECONDS) is None
    assert isinstance(ahead.error, OSError)


def test_row_that_cannot_be_sent_is_an_error_of_its_own() -> None:
    ahead, got = reader(iter([Row("a", {"prompt": lambda: None}), Row("b", "x")]))
    output = got.get(timeout=SECONDS)
    assert isinstance(output, RequestOutput)
    assert output.error is not None
    assert (output.key, output.request_id, output.error.code) == ("a", "0", "prompt")
    assert leased(got).number == 1
    assert ahead.count == 2
