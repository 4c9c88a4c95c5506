"""Chooses rows of a job while it runs, and compares them with the reference path at its end."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_result import RowCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.shadow.replay import AnsweredRow, ReplayedOutput, replay_rows
from idefics2_engine.jobs.shadow.row_choice import ChosenRow, RowChoice
from idefics2_engine.jobs.shadow.shadow_figures import shadow_figures
from idefics2_engine.jobs.shadow.shadow_file import ShadowFile
from idefics2_engine.jobs.shadow.shadow_size import ShadowSize
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.outputs import RequestOutput

_logger = logging.getLogger(__name__)

SHARE_OF_TIME = 0.02
"""Most of a run's time that comparing may take, after the first row of a job."""
# The reference attends to a whole row at once, and the memory for it grows with the square
MAX_TOKENS = 4096


class ShadowRun(NamedTuple):
    """What a run spent on comparing.

    Attributes:
        seconds: Duration.
        compared: Rows that were compared.
        failed: Rows that could not be.
        skipped: Rows for which there was no time.
        ended_early: Whether an interrupt or an error ended the comparison.
    """

    seconds: float = 0.0
    compared: int = 0
    failed: int = 0
    skipped: int = 0
    ended_early: bool = False


class ShadowRows(JobObserver):
    """The rows of a job that are also computed on the reference path.

    Rows whose prompt and answers have more than 4,096 tokens are not chosen.

    Args:
        out: The output of the job.
        size: How many rows are chosen.
        seed: The job's seed.
        fingerprint: The job's fingerprint.
        same_operations: Whether the engine's operations are the reference.
        files: Calls of the operating system.
        clock: Seconds that only grow.

    Attributes:
        run: What this run spent on it.
    """

    def __init__(
        self,
        out: Path,
        size: ShadowSize,
        *,
        seed: int,
        fingerprint: str,
        same_operations: bool = False,
        files: FileOperations | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.run = ShadowRun()
        self._folder = job_path(out)
        self._choice = RowChoice(size, seed)
        self._fingerprint = fingerprint
        self._same_operations = same_operations
        self._files = files
        self._clock = clock
        self._file: ShadowFile | None = None
        self._is_stopped = False

    def begin(self, counts: RowCounts) -> None:
        """Read what earlier runs found."""
        self._file = ShadowFile(self._folder, self._fingerprint, self._files)

    def answer_row(self, row: JobRow, output: RequestOutput) -> None:
        """Keep the tokens of a row that may be chosen."""
        answers = tuple(tuple(one.token_ids) for one in output.outputs)
        num_tokens = len(output.prompt_token_ids) + sum(map(len, answers))
        rank = self._choice.may_take(row)
        if rank is not None and num_tokens <= MAX_TOKENS:
            assert self._file is not None
            self._file.add(row, answers)
            self._choice.take(ChosenRow(rank, row, answers))

    def finish_row(self, finished: FinishedRow) -> None:
        """Choose among rows that the journal has, if their tokens are known."""
        row = finished.row
        if finished.answer is not None or self._choice.may_take(row) is None:
            return
        assert self._file is not None
        known = self._file.known.pop((row.index, row.key), None)
        rank = self._choice.may_take(row)
        if known is not None and rank is not None and finished.out.get("error") is None:
            self._choice.take(ChosenRow(rank, row, *known))

    def end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    @property
    def is_due(self) -> bool:
        """Whether no row was compared, and one can be."""
        rows = self._choice.rows()
        return bool(rows) and all(one.agreement is None for one in rows)

    def compare(self, engine: RowEngine, seconds: float, tick: Callable[[], None]) -> None:
        """Compare chosen rows, in the order of their ranks, while there is time.

        The rows of the job are finished, so an error ends the comparison alone and is logged.

        Args:
            engine: The engine, without rows in flight.
            seconds: What the run took so far, 2 % of which may be used. If no row of the job was
                compared before, one is.
            tick: Called after each row.
        """
        begin = self._clock()
        is_due = self.is_due
        open_rows = [one for one in self._choice.rows() if one.agreement is None]
        by_id = {one.row.id: one for one in open_rows}
        begins: dict[str | int, float] = {}
        longest = 0.0
        compared = failed = 0
        is_broken = False

        def rows() -> Iterator[AnsweredRow]:
            for one in open_rows:
                now = self._clock()
                is_free = is_due and not begins
                if self._is_stopped or not (
                    is_free or now - begin + longest <= SHARE_OF_TIME * seconds
                ):
                    return
                begins[one.row.id] = now
                row = one.row.to_engine()
                yield AnsweredRow(row.key, row.prompt, row.sampling_params, one.answers)

        try:
            for output in replay_rows(engine, rows()):
                assert output.key is not None
                longest = max(longest, self._clock() - begins[output.key])
                one = by_id[output.key]
                if isinstance(output, ReplayedOutput) and output.agreement is not None:
                    assert self._file is not None
                    self._file.add(one.row, one.answers, output.agreement)
                    one.agreement = output.agreement
                    compared += 1
                else:
                    _logger.warning("%s is not compared: %s", one.row.place, output.error)
                    failed += 1
                tick()
        except Exception:
            _logger.exception("comparing rows with the reference ended early")
            is_broken = True
        skipped = len(open_rows) - compared - failed
        self.run = ShadowRun(
            *(self._clock() - begin, compared, failed, skipped),
            ended_early=is_broken or self._is_stopped,
        )

    def stop(self) -> bool:
        """Compare no further row; return whether this is the first call. Any thread may call it."""
        is_first, self._is_stopped = not self._is_stopped, True
        return is_first

    def figures(self) -> dict[str, Any]:
        """Return what was found, as JSON data of the summary."""
        return shadow_figures(self._choice.rows(), same_operations=self._same_operations)
