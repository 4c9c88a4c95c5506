"""The flow of rows through a run: from the input to the engine, and from it to the row store."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import Any

from idefics2_engine.jobs.finished_rows import FinishedRows, parsed_row
from idefics2_engine.jobs.job_errors import OutputLostError
from idefics2_engine.jobs.job_events import Event, Events, Interrupted, send_answers
from idefics2_engine.jobs.job_observer import JobObserver
from idefics2_engine.jobs.job_options import RETRIED_CODES, JobOptions
from idefics2_engine.jobs.job_result import Ending
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.job_rows import JobRows, RowEncoding
from idefics2_engine.jobs.known_rows import KnownRows
from idefics2_engine.jobs.row_engine import Answers, RowEngine
from idefics2_engine.jobs.row_feed import RowFeed, RowRead
from idefics2_engine.jobs.row_store import RowStore
from idefics2_engine.outputs import RequestOutput

_logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
# The engine's thread gets Python's lock meanwhile. Without a pause it made a step in 120 ms, not 10
_PAUSE_SECONDS = 0.0002
_UNWRITABLE = RowError("internal", "engine", "the answer cannot be written as JSON")


class JobFlow:
    """Moves rows on the thread that runs the job, which owns the counts and the store.

    The engine reads rows on a thread of its own, and another one waits for its answers. Both send
    events to this one.

    Args:
        store: Where finished rows go.
        encoding: Makes rows of the output.
        options: Options of the run.
        observers: Are told what happens.
        clock: Seconds that only grow.

    Attributes:
        counts: Counts of all finished rows.
        run: Counts of those that this run finished.
        ending: Why the run ends before all rows are finished. ``None`` if it does not.
        message: The same, for the operator.
        feed: The rows that the engine reads, once it is there.
        known: Rows of the journal that are not compared with the input yet.
        answer_seconds: Time in which this thread waited for events, or compared rows meanwhile.
    """

    def __init__(
        self,
        store: RowStore,
        encoding: RowEncoding,
        options: JobOptions,
        observers: Sequence[JobObserver] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._finished = FinishedRows(
            store, observers, lambda message: self.end(Ending.OUTPUT_LOST, message)
        )
        self.counts, self.run = self._finished.counts, self._finished.run
        self.ending: Ending | None = None
        self.message = ""
        self.feed: RowFeed | None = None
        self.known = KnownRows()
        self.answer_seconds = 0.0
        self._store = store
        self._encoding = encoding
        self._options = options
        self._clock = clock
        self._ticked = clock()
        self._events: Events = SimpleQueue()
        self._interrupts = 0
        self._answers: Answers | None = None
        self._deadline: float | None = None
        # Those that follow the first one that needs the engine
        self._rows: Iterator[JobRow] = iter(())
        # The first row of the feed that is not finished
        self._reached = 0
        # The rows that the engine has, by id, and how often it was asked again for some of them
        self._in_flight: dict[str | int, JobRow] = {}
        self._repeats: dict[int, int] = {}

    def interrupt(self) -> None:
        """End softly, at once if called again. Any thread and signal handler may call this."""
        self._interrupts += 1
        self._events.put(Interrupted())

    def settle(self, rows: JobRows) -> JobRow | None:
        """Finish rows that need no engine; return the first one that needs it, or ``None``.

        Rows that the journal has at the beginning are left to ``answer``, if a row behind them
        needs the engine and is reached without reading them. The run may have to end instead.
        """
        begin = self._store.first_missing if rows.can_skip else 0
        self.known = KnownRows(rows.rows(), begin, most_open=self._options.in_flight)
        self._rows = rows.rows(begin=begin)
        first = self._settle()
        if first is None and self.ending is None and begin:
            self.known = KnownRows()
            self._rows = islice(rows.rows(), begin)
            first = self._settle()
        return first

    def _settle(self) -> JobRow | None:
        for row in self._rows:
            record = self._store.find(row)
            if self._interrupts:
                self.end(Ending.INTERRUPTED, "interrupted")
            if self.ending is not None:
                return None
            if not self._finish_known(row, record):
                return row
        return None

    def answer(self, engine: RowEngine, first: JobRow) -> None:
        """Finish all rows with the engine, from ``first`` on, unless the run has to end.

        Raises:
            InputLostError: The input cannot be read. All rows before are finished.
            Exception: The engine raised it.
        """
        self._reached = first.index
        self.feed = RowFeed(
            chain([first], self._rows),
            begin=first.index,
            window=self._options.window_rows,
            in_flight=self._options.in_flight,
            find=self._store.find,
            on_read=self._events.put,
        )
        self._answers = engine.iterate(
            self.feed,
            in_flight=self._options.in_flight,
            max_prepared_bytes=self._options.max_prepared_bytes,
        )
        self._finished.load(engine)
        # The engine may be in the middle of a step when the run ends
        threading.Thread(
            target=send_answers,
            args=(self._answers, self._events),
            name="idefics2-answers",
            daemon=True,
        ).start()
        try:
            self._take_events()
        finally:
            # The reading thread must not wait for commands forever
            self.feed.drain()
        self._finished.journal_held()
        if self.known.error is not None:
            raise self.known.error
        is_short = not self.feed.has_ended or self._store.next_row < self.feed.num_read
        if self.ending is None and is_short:
            raise RuntimeError(
                f"the engine must answer the {self.feed.num_read} rows that were read and all "
                f"others, got {self._store.next_row} in order"
            )

    def _take_events(self) -> None:
        """Take events until the engine has no more answers or the time for them is over."""
        while (event := self._next_event()) is not None:
            if isinstance(event, RowRead):
                self._take_row(event)
            elif isinstance(event, RequestOutput):
                self._take_answer(event)
            elif isinstance(event, Interrupted):
                self.end(Ending.INTERRUPTED, "interrupted")
                if self._interrupts > 1:
                    break
            else:
                if event.error is not None:
                    raise event.error
                break

    def _next_event(self) -> Event | None:
        """Wait for an event; return ``None`` if the time for it is over."""
        begin = time.perf_counter()
        while True:
            seconds = TICK_SECONDS
            if self._deadline is not None:
                seconds = min(seconds, self._deadline - self._clock())
                if seconds <= 0:
                    return None
            is_checking = self.ending is None and self.known.may_read
            try:
                event = self._events.get(timeout=_PAUSE_SECONDS if is_checking else seconds)
            except Empty:
                if is_checking:
                    self._check_known()
                if not is_checking or not 0 <= self._clock() - self._ticked < TICK_SECONDS:
                    self.tick()
                continue
            self.answer_seconds += time.perf_counter() - begin
            return event

    def _check_known(self) -> None:
        """Finish a few rows that the journal has, or have them computed if it has others."""
        assert self.feed is not None
        for row in self.known.read():
            record = self._store.find(row)
            if not self._finish_known(row, record):
                self.known.open(row)
                self.run.computed += 1
                self._in_flight[row.id] = row
                self.feed.repeat(row)
            if self.ending is not None:
                return
        if self.known.error is not None:
            self._drain()

    def tick(self) -> None:
        """Do what is done about every second: sync the journal, and show progress."""
        self._ticked = self._clock()
        self._finished.tick()

    def _take_row(self, read: RowRead) -> None:
        """Finish a row that was read, unless the engine gets it."""
        if self._finish_known(read.row, read.record):
            return
        self.run.computed += 1
        self._in_flight[read.row.id] = read.row
        if read.record is not None:
            assert self.feed is not None
            self.feed.repeat(read.row)

    def _finish_known(self, row: JobRow, record: int | None) -> bool:
        """Finish a row that the journal has or that is bad; return whether it is one."""
        if record is None and row.error is None:
            return False
        if record is None:
            assert row.error is not None
            self._finish(row, self._encoding.error(row, row.error))
            return True
        try:
            out = self._store.read(row, record)
        except OutputLostError as lost:
            self.end(Ending.OUTPUT_LOST, str(lost))
            return True
        data = parsed_row(out)
        error = data["error"]
        if row.error is None and error is not None and self._options.is_retried(error["code"]):
            return False
        self._finish(row, out, record, data=data)
        return True

    def _take_answer(self, output: RequestOutput) -> None:
        assert output.key is not None
        assert self.feed is not None
        row = self._in_flight.pop(output.key)
        if output.error is None:
            try:
                out = self._encoding.answer(row, output)
            except Exception:
                _logger.exception("%s: the answer cannot be written as JSON", row.place)
                out = self._encoding.error(row, _UNWRITABLE)
            else:
                self._finished.tell_answer(row, output)
        else:
            error = self._encoding.error_of(output.error)
            repeats = self._repeats.get(row.index, 0)
            if error.code in RETRIED_CODES and repeats < self._options.retries:
                # If the run ends, the next one computes the row
                self._repeats[row.index] = repeats + 1
                self.run.repeated += 1
                self._in_flight[row.id] = row
                self.feed.finish()
                self.feed.repeat(row)
                return
            out = self._encoding.error(row, error)
        self._finish(row, out, answer=output)

    def _finish(
        self,
        row: JobRow,
        out: bytes,
        record: int | None = None,
        answer: RequestOutput | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Journal a row, unless it is in a record, and write it; ``data`` is ``out``, if parsed."""
        attempts = 0 if answer is None else self._repeats.get(row.index, 0) + 1
        if not self._finished.add(row, out, record, answer, data, attempts):
            return
        self._repeats.pop(row.index, None)
        self.known.close(row)
        if self.feed is not None:
            if answer is not None:
                self.feed.finish()
            self._reached = self._store.first_unfinished(self._reached)
            self.feed.advance(self._reached, self._store.next_row)
        limit, errors = self._options.max_errors, self.counts.num_errors
        # Rows of the journal are counted as answered until they are compared
        rows = self.counts.rows + self.known.num_left
        if limit.is_exceeded(errors, rows):
            self.end(
                Ending.TOO_MANY_ERRORS,
                f"{errors} of {rows} rows are errors, at most {limit} are allowed (--max-errors)",
            )

    def end(self, ending: Ending, message: str) -> None:
        """Read no more rows, and wait for those in flight until the time for it is over."""
        if self.ending is not None:
            return
        self.ending, self.message = ending, message
        self._deadline = self._clock() + self._options.drain_timeout
        self._drain()

    def _drain(self) -> None:
        """Have the engine read no more rows."""
        if self.feed is not None:
            self.feed.drain()
        if self._answers is not None:
            self._answers.drain()
