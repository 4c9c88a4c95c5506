"""A run of a job, which begins or resumes it and ends with one row of output for each input row."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from idefics2_engine.jobs.job_errors import JobError, OutputLostError, input_lost
from idefics2_engine.jobs.job_flow import JobFlow
from idefics2_engine.jobs.job_observer import JobObserver
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import Ending, JobResult, RowCounts, RunCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.job_rows import JobRows, RowEncoding
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.row_store import RowStore, lost_output, output_lost
from idefics2_engine.jobs.shadow.shadow_rows import ShadowRows
from idefics2_engine.jobs.stage_waits import StageWaits, StageWatch
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.input_files import check_apart
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import JobFolder
from idefics2_engine.jobs.store.journal import Recovery
from idefics2_engine.model_files import printable_path
from idefics2_engine.runtime.stats import EngineStats

EngineFactory = Callable[[], AbstractContextManager[RowEngine]]
"""Loads an engine. The end of its context ends iterators that another thread waits for."""


class JobRunner:
    """Runs one job. Rows that its journal has are not computed again.

    Args:
        out: The output.
        rows: The input.
        make_engine: Loads the engine, once a row has to be computed.
        encoding: Makes rows of the output.
        job: What the job is, with its fingerprint.
        options: How to run it.
        observers: Are told what happens.
        shadow: Rows that are compared with the reference path when all rows are answered.
        on_complete: Called with the result and the job when the output has its name, before the
            job's lock is released. An ``OSError`` ends the run as one of the output does.
        is_described: Whether what ``on_complete`` makes is there. If it is not, the rows of a job
            that is complete are taken from the journal again.
        files: Calls of the operating system.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        out: Path,
        rows: JobRows,
        make_engine: EngineFactory,
        encoding: RowEncoding,
        job: JobDescription,
        options: JobOptions | None = None,
        *,
        observers: Sequence[JobObserver] = (),
        shadow: ShadowRows | None = None,
        on_complete: Callable[[JobResult, JobDescription], None] | None = None,
        is_described: bool = True,
        files: FileOperations | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._rows = rows
        self._make_engine = make_engine
        self._encoding = encoding
        self._job = job
        self._options = options or JobOptions()
        self._observers = [*observers, *([] if shadow is None else [shadow])]
        self._shadow = shadow
        self._is_comparing = False
        self._on_complete = on_complete
        self._is_described = is_described
        self._files = files
        self._clock = clock
        self._flow: JobFlow | None = None
        self._load_seconds = 0.0
        self._waits = StageWaits()

    def interrupt(self) -> bool:
        """End softly, and at once if called again. Signal handlers and any thread may call this.

        Returns:
            Whether the run takes notice. It cannot while the job is opened and while the engine is
            loaded, where ``KeyboardInterrupt`` on its thread ends it.
        """
        if self._is_comparing:
            assert self._shadow is not None
            return self._shadow.stop()
        flow = self._flow
        if flow is not None:
            flow.interrupt()
        return flow is not None

    def run(self) -> JobResult:
        """Run the job until it is complete or has to end.

        Raises:
            JobError: The job cannot be begun or resumed, or its input cannot be read.
            Exception: The engine raised it. Rows that were finished are in the journal.
        """
        try:
            check_apart(self._out, self._rows.files)
        except OSError as error:
            raise input_lost(error) from error
        try:
            folder = JobFolder(
                self._out,
                self._job,
                restart=self._options.restart,
                force_resume=self._options.force_resume,
                overwrite=self._options.overwrite,
                files=self._files,
            )
        except OSError as error:
            lost = output_lost(self._out, error)
            return JobResult(Ending.OUTPUT_LOST, RowCounts(), message=str(lost))
        with folder:
            changes, moved = tuple(folder.input_changes), tuple(folder.moved)
            if self._is_complete(folder):
                assert folder.finished is not None
                counts = RowCounts(rows=folder.finished.rows)
                return JobResult(Ending.COMPLETE_BEFORE, counts, output=folder.finished)
            if folder.finished and folder.finished.rows and not folder.has_journal:
                raise JobError(
                    f"{printable_path(self._out)}: a job that continues must have a journal, got a "
                    "merged output; run and merge its shards again (--restart computes all rows)"
                )
            result = self._run_in(folder)
            result = replace(result, input_changes=changes, moved=moved)
            if result.ending is Ending.COMPLETE and self._on_complete is not None:
                try:
                    self._on_complete(result, folder.job)
                except OSError as error:
                    lost = output_lost(self._out, error)
                    return replace(result, ending=Ending.OUTPUT_LOST, message=str(lost))
            return result

    def _is_complete(self, folder: JobFolder) -> bool:
        """Return whether there is nothing to do for an output that is there."""
        # Without an identity, only the rows say whether the input is the same
        is_same = bool(self._job.inputs) and not folder.input_changes
        # What describes the output is made again from the journal
        is_described = self._is_described or not folder.has_journal
        return (
            folder.finished is not None
            and is_same
            and is_described
            and self._options.retry_errors is None
        )

    def _run_in(self, folder: JobFolder) -> JobResult:
        """Run the job in its folder."""
        begin = time.perf_counter()
        ending, message, output = Ending.COMPLETE, "", None
        counts, run, recovered = RowCounts(), RunCounts(), Recovery(0, 0, 0)
        flow: JobFlow | None = None
        try:
            with RowStore(
                folder,
                rows_in_memory=self._options.rows_in_memory,
                make_format=self._encoding.make_format,
                files=self._files,
                clock=self._clock,
            ) as store:
                flow = JobFlow(store, self._encoding, self._options, self._observers, self._clock)
                counts, run, recovered = flow.counts, flow.run, store.recovered
                try:
                    with lost_output(folder.path):
                        for observer in self._observers:
                            observer.begin(counts)
                    self._finish_rows(flow)
                finally:
                    with lost_output(folder.path), ExitStack() as stack:
                        for observer in self._observers:
                            stack.callback(observer.end)
                if flow.ending is None:
                    output = store.publish()
                else:
                    ending, message = flow.ending, flow.message
        except OutputLostError as lost:
            if ending is Ending.COMPLETE:
                ending, message = Ending.OUTPUT_LOST, str(lost)
        finally:
            self._flow = None
        shadow_seconds = 0.0 if self._shadow is None else self._shadow.run.seconds
        return JobResult(
            ending,
            counts,
            run,
            seconds=time.perf_counter() - begin - self._load_seconds - shadow_seconds,
            load_seconds=self._load_seconds,
            waits=self._waits,
            shadow=None if self._shadow is None else self._shadow.figures(),
            shadow_run=None if self._shadow is None else self._shadow.run._asdict(),
            message=message,
            output=output,
            recovered=recovered,
            num_unchecked=0 if flow is None else flow.known.num_left,
        )

    def _finish_rows(self, flow: JobFlow) -> None:
        """Finish all rows, or as many as there are before the run has to end."""
        self._flow = flow
        first = flow.settle(self._rows)
        is_due = self._shadow is not None and self._shadow.is_due
        if flow.ending is not None or (first is None and not is_due):
            return
        begin = time.perf_counter()
        with ExitStack() as stack:
            # Nothing is in flight that could be drained
            self._flow = None
            try:
                engine = stack.enter_context(self._make_engine())
            except KeyboardInterrupt:
                flow.end(Ending.INTERRUPTED, "interrupted")
                return
            self._flow = flow
            loaded = time.perf_counter()
            self._load_seconds = loaded - begin
            if first is not None:
                self._answer(flow, engine, first)
            if flow.ending is None:
                self._compare(flow, engine, time.perf_counter() - loaded)

    def _answer(self, flow: JobFlow, engine: RowEngine, first: JobRow) -> None:
        stats = getattr(engine, "stats", None)
        watch = StageWatch(stats if isinstance(stats, EngineStats) else None)
        try:
            flow.answer(engine, first)
        finally:
            assert flow.feed is not None
            self._waits = watch.waits(flow.feed, flow.answer_seconds)

    def _compare(self, flow: JobFlow, engine: RowEngine, seconds: float) -> None:
        """Compare rows with the reference path, when the run took ``seconds`` to answer all."""
        if self._shadow is None:
            return
        self._is_comparing = True
        try:
            self._shadow.compare(engine, seconds, flow.tick)
        finally:
            self._is_comparing = False
