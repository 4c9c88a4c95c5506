"""Processes that plan the rows of a long job, of which this process reads and counts the rows."""

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from idefics2_engine.errors import InternalError
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.plan.row_batches import row_batches
from idefics2_engine.jobs.plan.row_planner import PlannedRow, RowPlanner
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams

# So many batches are planned here first. Starting a process takes as long as planning them
_FIRST_BATCHES = 32
# Batches for each process, one of which it plans
_AT_ONCE = 3
# Reading rows takes a third of the time of planning them, so more processes would wait
_MOST_PROCESSES = 8

Sent = tuple[int, str | int, Any, SamplingParams | None]
Counted = tuple[Any, ...]


@dataclass(frozen=True)
class PlannerRecipe:
    """All that a planner is built from, in any process.

    Attributes:
        folder: The checkpoint, which needs no weights.
        split: Whether images are split. If ``None``, the checkpoint decides.
        media: Rules for images.
        max_model_len: Most tokens of a prompt and its answer together.
        defaults: Parameters of rows that have none.
        check: What to look at of an image.
    """

    folder: Path
    split: bool | None
    media: MediaConfig
    max_model_len: int
    defaults: SamplingParams
    check: ImageCheck

    def build(self) -> RowPlanner:
        """Return a planner.

        Raises:
            ConfigError: A file of the checkpoint is invalid.
        """
        config = ModelConfig.load(self.folder)
        processor = Processor.load(self.folder, config, self.split, self.media)
        return RowPlanner(
            processor,
            config,
            GenerationConfig.of_checkpoint(self.folder, processor.tokenizer),
            self.max_model_len,
            defaults=self.defaults,
            check=self.check,
        )


def usable_cores() -> int:
    """Return how many cores this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_PROCESSES, usable or 1)


def plan_in_processes(
    rows: Iterable[JobRow],
    recipe: PlannerRecipe,
    count: int,
    first_batches: int = _FIRST_BATCHES,
) -> Iterator[PlannedRow]:
    """Plan ``rows``, lazily and in order.

    Args:
        rows: Rows of a reader, which pickle.
        recipe: The planner.
        count: Processes. One is this process alone.
        first_batches: Batches that this process plans before it starts others.

    Raises:
        InternalError: A process ended.
    """
    planner = recipe.build()
    batches = row_batches(rows)
    for batch in batches if count < 2 else islice(batches, first_batches):
        yield from planner.plan_batch(batch)
    following = next(batches, None)
    if following is None:
        return
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(recipe,)
    )
    try:
        planned: deque[tuple[list[JobRow], Future[list[Counted]]]] = deque()
        for batch in chain([following], batches):
            planned.append((batch, pool.submit(_plan, [_sent(row) for row in batch])))
            if len(planned) > _AT_ONCE * count:
                yield from _received(*planned.popleft())
        while planned:
            yield from _received(*planned.popleft())
    except BrokenProcessPool as error:
        raise InternalError("plan: a process that planned rows ended") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _sent(row: JobRow) -> Sent | None:
    """Return what a plan depends on, ``None`` for a row with an error."""
    return None if row.error else (row.number, row.id, row.prompt, row.sampling_params)


def _received(rows: list[JobRow], planned: "Future[list[Counted]]") -> Iterator[PlannedRow]:
    for row, counted in zip(rows, planned.result(), strict=True):
        yield PlannedRow(row, *counted) if counted else PlannedRow(row, row.error)


_planner: RowPlanner
"""That of a process started here."""


def _start(recipe: PlannerRecipe) -> None:
    global _planner
    # An interrupt is the matter of the process that reads rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Each core has a process, so the tokenizer needs no threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _planner = recipe.build()
    # What is here stays, so collections need not look at it
    gc.freeze()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # A parent that was killed has not told the pool to end
    os._exit(1)


def _plan(rows: list[Sent | None]) -> list[Counted]:
    good = [JobRow(0, number, id, "", "", *rest) for number, id, *rest in filter(None, rows)]
    planned = iter(_planner.plan_batch(good))
    return [() if row is None else next(planned)[1:] for row in rows]
