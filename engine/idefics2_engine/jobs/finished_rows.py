"""Finished rows of a run: they are stored and counted, and observers are told of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from idefics2_engine.jobs.job_errors import OutputLostError
from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_result import RowCounts, RunCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.row_store import RowStore, lost_output
from idefics2_engine.outputs import RequestOutput


class FinishedRows:
    """Stores and counts rows. Those that cannot be journalled are held.

    Args:
        store: Where the rows go.
        observers: Are told what happens.
        on_lost: Called with a message when the output is lost, which ends the run.

    Attributes:
        counts: Counts of all finished rows.
        run: Counts of those that this run finished.
    """

    def __init__(
        self,
        store: RowStore,
        observers: Sequence[JobObserver],
        on_lost: Callable[[str], None],
    ) -> None:
        self.counts = RowCounts()
        self.run = RunCounts()
        self._store = store
        self._observers = observers
        self._on_lost = on_lost
        self._held: list[tuple[JobRow, bytes]] = []

    def load(self, engine: RowEngine) -> None:
        """Tell observers that the engine is there.

        Raises:
            OutputLostError: A file of an observer cannot be written.
        """
        with lost_output(self._store.path):
            for observer in self._observers:
                observer.load(engine)

    def tick(self) -> None:
        """Sync the journal, and show progress."""
        try:
            self._store.tick()
            with lost_output(self._store.path):
                for observer in self._observers:
                    observer.tick()
        except OutputLostError as lost:
            self._on_lost(str(lost))

    def tell_answer(self, row: JobRow, output: RequestOutput) -> None:
        """Tell observers of an answer that is not journalled yet."""
        try:
            with lost_output(self._store.path):
                for observer in self._observers:
                    observer.answer_row(row, output)
        except OutputLostError as lost:
            self._on_lost(str(lost))

    def add(
        self,
        row: JobRow,
        out: bytes,
        record: int | None = None,
        answer: RequestOutput | None = None,
        data: Mapping[str, Any] | None = None,
        attempts: int = 0,
    ) -> bool:
        """Journal a row, unless it is in a record, and write it.

        Args:
            row: The row.
            out: Its output.
            record: Number of its record, if the journal has it.
            answer: What the engine said.
            data: ``out``, if it is parsed.
            attempts: How often the engine was asked.

        Returns:
            Whether it is journalled. If it is not, it is held.
        """
        try:
            if record is None:
                self._store.add(row, out)
            else:
                self._store.add_record(row, record, out)
        except OutputLostError as lost:
            self._on_lost(str(lost))
            if self._store.find(row) is None:
                self._held.append((row, out))
                return False
        data = parsed_row(out) if data is None else data
        self.counts.add(data)
        if record is None:
            self.run.add(data)
        if answer is not None:
            self.run.patches += answer.num_patches
        try:
            with lost_output(self._store.path):
                for observer in self._observers:
                    observer.finish_row(FinishedRow(row, data, answer, attempts))
        except OutputLostError as lost:
            self._on_lost(str(lost))
        return True

    def journal_held(self) -> None:
        """Try again to journal rows, for which there may be room by now."""
        held, self._held = self._held, []
        try:
            for row, out in held:
                self._store.add(row, out)
                for counts in (self.counts, self.run):
                    counts.add(parsed_row(out))
        except OutputLostError:
            # The next run computes the others
            pass


def parsed_row(out: bytes) -> dict[str, Any]:
    """Return a row of the output, which is UTF-8; ``json`` would guess the encoding of bytes."""
    data: dict[str, Any] = json.loads(out.decode())
    return data
