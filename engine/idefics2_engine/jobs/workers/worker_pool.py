"""Answers rows on several processes, each with an engine, so that one that dies costs no row."""

import logging
import os
import pickle
import weakref
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import NamedTuple, Self

from idefics2_engine.errors import ConfigError, WorkerLostError
from idefics2_engine.field_checks import Whole, check
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.leases import LeasedRow, Leases
from idefics2_engine.jobs.workers.messages import (
    Answered,
    Begin,
    BuildFailed,
    FromWorker,
    Ready,
    Rows,
)
from idefics2_engine.jobs.workers.read_ahead import ReadAhead
from idefics2_engine.jobs.workers.worker_place import WorkerPlace, place_workers
from idefics2_engine.jobs.workers.worker_process import Ended, Start, Worker, WorkerProcess
from idefics2_engine.jobs.workers.worker_processes import WorkerPoolError, WorkerProcesses
from idefics2_engine.outputs import RequestOutput, RowOutputs, failed_output
from idefics2_engine.row import Row

__all__ = ["MAX_PREPARED_BYTES", "WorkerPool", "WorkerPoolError"]

_logger = logging.getLogger(__name__)

# That of LLM, whose module imports torch
MAX_PREPARED_BYTES = 2 << 30
_CLOSED = "the workers were closed"


class _FromReader(NamedTuple):
    """A row that was read, the output of one that cannot be sent, or None at the end of rows."""

    reader: ReadAhead
    row: LeasedRow | RequestOutput | None


class _FromProcess(NamedTuple):
    process: Worker
    message: FromWorker | Ended


class _Closed(NamedTuple):
    """The pool was closed."""


_Events = SimpleQueue[_FromReader | _FromProcess | _Closed]


class WorkerPool:
    """Processes that answer rows. It is a context manager, and one ``iterate`` runs at a time.

    Processes are started when the first row was read, and stay for later calls of ``iterate``. If
    one ends, its rows are answered by others, and it is started again. The metrics of an output are
    ``WorkerMetrics``, with the number of the worker.

    Args:
        spec: What each process builds.
        count: Processes. If ``None``, one for each GPU, and one on a CPU.
        threads: Threads of each process. If ``None``, its share of the cores.
        places: Where each worker computes, in place of ``count`` and ``threads``.
        on_gpu: Whether workers compute on GPUs. If ``None``, whether any place is one.
        start: Starts a worker. If ``None``, it is a process of this machine.

    Attributes:
        places: Where each worker computes.
    """

    def __init__(
        self,
        spec: EngineSpec,
        count: int | None = None,
        *,
        threads: int | None = None,
        places: list[WorkerPlace] | None = None,
        on_gpu: bool | None = None,
        start: Start | None = None,
    ) -> None:
        self.places = places or place_workers(count, spec.device, threads=threads)
        if on_gpu is None:
            on_gpu = any(place.device is not None for place in self.places)
        self._at_once = spec.max_num_seqs(on_gpu=on_gpu)
        self._events: _Events = SimpleQueue()
        self._is_running = False

        def put(process: Worker, message: FromWorker | Ended) -> None:
            events.put(_FromProcess(process, message))

        # The threads of a process must not refer to the pool, which they would keep alive
        events = self._events
        self._processes = WorkerProcesses(spec, self.places, put, start)
        self._finalizer = weakref.finalize(self, _close, self._processes, events, os.getpid())

    @property
    def num_workers(self) -> int:
        """Processes."""
        return len(self.places)

    @property
    def num_deaths(self) -> int:
        """Processes that ended before their time."""
        return self._processes.deaths.total

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes, by number of the worker."""
        running = self._processes.running
        return [process.pid for process in running if isinstance(process, WorkerProcess)]

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the pool."""
        self.close()

    def close(self) -> None:
        """Kill the processes; a second call does nothing. Any thread may call this.

        An iterator that is not finished raises ``RuntimeError``.
        """
        self._finalizer()

    def iterate(
        self,
        prompts: Iterable[Row],
        *,
        in_flight: int | None = None,
        max_prepared_bytes: int = MAX_PREPARED_BYTES,
    ) -> RowOutputs:
        """Answer rows, which are read lazily, and yield each output when it is finished.

        Args:
            prompts: The rows, which are read on a thread of their own.
            in_flight: Rows that are read and not yet yielded. If ``None``, twice ``max_num_seqs``
                for each worker.
            max_prepared_bytes: Most bytes of prepared images of all workers together, and of rows
                in flight in this process.

        Returns:
            An iterator of the outputs, as of ``LLM.iterate``: ``request_id`` is the place among
            ``prompts``, and a bad row is an output with an error. A row whose worker ended each
            time, the last time with no other row, has a ``WorkerLostError``. ``close`` of the
            iterator kills the workers that have rows.

            The iterator raises an exception of ``prompts`` after all rows before are answered, the
            ``Idefics2Error`` of a worker that cannot build its engine, and ``WorkerPoolError`` if
            one cannot for another reason, or if workers end again and again without an answer.

        Raises:
            ConfigError: ``in_flight`` or ``max_prepared_bytes`` is not a positive integer.
            RuntimeError: The pool was closed, or another iterator of it is not finished.
        """
        if in_flight is None:
            in_flight = 2 * self._at_once * self.num_workers
        in_flight = check("in_flight", in_flight, Whole(1), ConfigError)
        max_bytes = check("max_prepared_bytes", max_prepared_bytes, Whole(1), ConfigError)
        return self._outputs(prompts, in_flight, max_bytes)

    def replay(self, rows: Iterable[Row]) -> RowOutputs:
        """Compare each worker with the reference on answered rows, one row at a time.

        Args:
            rows: The rows, ``AnsweredRow``. They are read when a worker has time for them.

        Returns:
            An iterator as of ``iterate``, with the outputs of ``replay_rows``.

        Raises:
            RuntimeError: As in ``iterate``.
        """
        return self._outputs(rows, self.num_workers, MAX_PREPARED_BYTES, is_replay=True)

    def _outputs(
        self, prompts: Iterable[Row], in_flight: int, max_bytes: int, *, is_replay: bool = False
    ) -> RowOutputs:
        if not self._finalizer.alive:
            raise RuntimeError(_CLOSED)

        def put(row: LeasedRow | RequestOutput | None) -> None:
            events.put(_FromReader(reader, row))

        # A source that blocks forever must not keep the pool alive
        events = self._events
        reader = ReadAhead(prompts, put, ahead=in_flight, max_bytes=max_bytes)
        begin = Begin(
            max(1, -(-in_flight // self.num_workers)),
            max(1, max_bytes // self.num_workers),
            is_replay,
        )
        return RowOutputs(self._iterate(reader, begin), reader.drain)

    def _iterate(self, reader: ReadAhead, begin: Begin) -> Generator[RequestOutput, None, None]:
        if self._is_running:
            raise RuntimeError("an iterator of these workers is not finished")
        self._is_running = True
        leases = Leases(self.num_workers, begin.in_flight)
        yielded = 0
        try:
            for process in self._processes.running:
                if process.is_ready:
                    process.send(begin)
            reader.start()
            while not reader.has_ended or yielded < reader.count:
                event = self._events.get()
                for output, num_bytes in self._handle(event, reader, leases, begin):
                    yielded += 1
                    reader.done(num_bytes)
                    yield output
                # A look at all workers after every row would cost more than the row
                if self._events.empty() or not _is_of_rows(event):
                    self._hand_out(leases, self.places)
                elif isinstance(event, _FromProcess):
                    self._hand_out(leases, [event.process.place])
            if reader.error is not None:
                raise reader.error
        finally:
            reader.drain()
            self._end_rows(leases)
            self._is_running = False

    def _handle(
        self,
        event: _FromReader | _FromProcess | _Closed,
        reader: ReadAhead,
        leases: Leases,
        begin: Begin,
    ) -> list[tuple[RequestOutput, int]]:
        """Handle an event; return finished outputs and the bytes that their rows had."""
        if isinstance(event, _FromReader):
            # A source may yield a row after its iterator was closed
            if event.reader is reader and isinstance(event.row, LeasedRow):
                leases.add(event.row)
            elif event.reader is reader and isinstance(event.row, RequestOutput):
                return [(event.row, 0)]
            return []
        if isinstance(event, _Closed):
            # One may have been started at the same time
            self._processes.kill_all()
            raise RuntimeError(_CLOSED)
        process, message = event
        worker = process.place.number
        # It may be of a process that was killed
        if self._processes.find(worker) is not process:
            return []
        match message:
            case Ready():
                process.is_ready = True
                process.send(begin)
            case BuildFailed():
                # The others would most likely say the same
                self._processes.kill_all()
                if message.error is not None:
                    raise message.error
                raise WorkerPoolError(f"worker {worker} cannot build its engine: {message.text}")
            case Answered():
                self._processes.deaths.row_answered()
                return [
                    (output, leases.finish(worker, int(output.request_id)))
                    for output in message.outputs
                ]
            case Ended():
                self._processes.remove_dead(process)
                return self._outputs_of_lost_rows(worker, message, leases)
        return []

    def _outputs_of_lost_rows(
        self, worker: int, ended: Ended, leases: Leases
    ) -> list[tuple[RequestOutput, int]]:
        lost, deaths = leases.end_worker(worker), self._processes.deaths
        for _ in lost:
            deaths.row_lost()
        is_given_up = ", and is not started again" if deaths.is_given_up(worker) else ""
        _logger.warning("worker %d ended with %s%s", worker, ended.how, is_given_up)
        if deaths.is_hopeless:
            self._processes.kill_all()
            said = f"; it wrote last:\n{ended.last_words}" if ended.last_words else ""
            raise WorkerPoolError(
                f"workers ended again and again without an answer, worker {worker} with "
                f"{ended.how}{said}"
            )
        error = "the process of the worker ended each time this row ran, the last time alone"
        return [
            (
                failed_output(str(number), WorkerLostError(error), pickle.loads(payload).key),
                len(payload),
            )
            for number, payload in lost
        ]

    def _hand_out(self, leases: Leases, places: Iterable[WorkerPlace]) -> None:
        """Send rows to workers that should have more, and start those that are missing."""
        if not leases:
            return
        for place in places:
            process = self._processes.find(place.number)
            if process is None:
                self._processes.start(place)
            elif process.is_ready and (rows := leases.take(place.number)):
                process.send(Rows(rows))

    def _end_rows(self, leases: Leases) -> None:
        """Let workers end their rows, and kill those that still have some."""
        for process in self._processes.running:
            if leases.has_rows(process.place.number):
                self._processes.kill(process.place.number)
            elif process.is_ready:
                process.send(Rows([]))


def _is_of_rows(event: _FromReader | _FromProcess | _Closed) -> bool:
    return isinstance(event, _FromReader) or (
        isinstance(event, _FromProcess) and isinstance(event.message, Answered)
    )


def _close(processes: WorkerProcesses, events: _Events, owner: int) -> None:
    """Kill the processes and tell an iterator, unless this process is a fork of their parent."""
    if os.getpid() == owner:
        processes.kill_all()
        events.put(_Closed())
