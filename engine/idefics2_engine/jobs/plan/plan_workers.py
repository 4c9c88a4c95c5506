"""Processes that plan the rows of a long job; this process reads and counts the rows."""

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.errors import InternalError
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.plan.row_batches import row_batches
from idefics2_engine.jobs.plan.row_planner import PlannedRow, RowPlanner
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.rows.row_builder import IdentifiedRow, RowBuilder
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams

# So many batches are planned here first. Starting a process takes as long as planning them
_FIRST_BATCHES = 32
# Batches for each process, one of which it plans
_AT_ONCE = 3
# Reading and counting rows takes a fifth of the time of planning them, so more would wait
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class PlannerRecipe:
    """All that a planner is built from, in any process.

    Attributes:
        folder: The checkpoint, which needs no weights.
        split: Whether images are split. If ``None``, the checkpoint decides.
        media: Rules for images.
        max_model_len: Most tokens of a prompt and its answer together.
        options: How the rows are read.
        defaults: Parameters of rows that have none.
        check: What to look at of an image.
    """

    folder: Path
    split: bool | None
    media: MediaConfig
    max_model_len: int
    options: InputOptions
    defaults: SamplingParams
    check: ImageCheck

    def build(self) -> "BatchPlanner":
        """Return a planner.

        Raises:
            ConfigError: A file of the checkpoint, or the prompt's template, is invalid.
        """
        config = ModelConfig.load(self.folder)
        processor = Processor.load(self.folder, config, self.split, self.media)
        planner = RowPlanner(
            processor,
            config,
            GenerationConfig.of_checkpoint(self.folder, processor.tokenizer),
            self.max_model_len,
            defaults=self.defaults,
            check=self.check,
        )
        root = processor.media.allowed_media_root
        assert root is not None, "a job has a media root"
        return BatchPlanner(RowBuilder.of(self.options, root, self.defaults), planner)


class BatchPlanner(NamedTuple):
    """Builds rows and plans them, in any process."""

    builder: RowBuilder
    planner: RowPlanner

    def plan(self, rows: Sequence[IdentifiedRow]) -> list[PlannedRow]:
        """Plan a batch."""
        return self.planner.plan_batch([self.builder.build(row) for row in rows])


def usable_cores() -> int:
    """Return how many cores this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_PROCESSES, usable or 1)


def plan_in_processes(
    rows: Iterable[IdentifiedRow],
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
        yield from planner.plan(batch)
    following = next(batches, None)
    if following is None:
        return
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(recipe,)
    )
    try:
        planned: deque[Future[list[PlannedRow]]] = deque()
        for batch in chain([following], batches):
            planned.append(pool.submit(_plan, batch))
            if len(planned) > _AT_ONCE * count:
                yield from planned.popleft().result()
        while planned:
            yield from planned.popleft().result()
    except BrokenProcessPool as error:
        raise InternalError("plan: a process that planned rows ended") from error
    finally:
        pool.shutdown(cancel_futures=True)


_planner: BatchPlanner
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


def _plan(rows: list[IdentifiedRow]) -> list[PlannedRow]:
    return _planner.plan(rows)
