"""How long each stage of a job waited, and what to change if the device had nothing to do."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from idefics2_engine.jobs.row_feed import RowFeed
from idefics2_engine.runtime.stats import EngineStats

# Less idle time than this share is not worth a sentence
_STARVED_SHARE = 0.05
# The first row of every job is waited for
_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class StageWaits:
    """Seconds of one run, while the engine was there.

    Attributes:
        run_seconds: Duration.
        read_seconds: Time in which the input was read.
        window_seconds: Time in which the reading waited for the oldest row.
        prepare_seconds: Time in which rows were prepared, added up over threads.
        idle_seconds: Time in which the engine had no row. ``None`` if the engine does not say.
        answer_seconds: Time in which the writer waited for answers.
        write_seconds: Time in which it wrote.
    """

    run_seconds: float = 0.0
    read_seconds: float = 0.0
    window_seconds: float = 0.0
    prepare_seconds: float = 0.0
    idle_seconds: float | None = None
    answer_seconds: float = 0.0
    write_seconds: float = 0.0

    def sentence(self) -> str:
        """Return how long each stage waited, and for what, as one line."""
        engine = "" if self.idle_seconds is None else f", engine {self.idle_seconds:.1f} s (rows)"
        return (
            f"waits: reader {self.window_seconds:.1f} s (window){engine}, "
            f"writer {self.answer_seconds:.1f} s (answers)"
        )

    def advice(self) -> str | None:
        """Return which option to change if the device starved for input, else ``None``."""
        least = max(_LEAST_SECONDS, _STARVED_SHARE * self.run_seconds)
        if self.idle_seconds is None or self.idle_seconds <= least:
            return None
        share = self.idle_seconds / self.run_seconds
        begin = f"The device starved for input {share:.0%} of the time:"
        if self.window_seconds >= self.idle_seconds / 2:
            return f"{begin} rows waited for a slow one; a larger --window reads further ahead."
        if self.read_seconds >= self.idle_seconds / 2:
            return f"{begin} the input is read slowly; put the files of -i on a faster disk."
        if self.prepare_seconds >= self.idle_seconds / 2:
            return (
                f"{begin} images are decoded slowly; raise --image-threads or --image-workers, or "
                "put --media-root on a faster disk."
            )
        if self.write_seconds >= self.idle_seconds / 2:
            return f"{begin} the output is written slowly; put -o on a faster disk."
        return f"{begin} too few rows were in flight; raise --in-flight."


class StageWatch:
    """Measures the waits of a run from its creation on.

    Args:
        stats: Counters of the engine, if it has some.
        clock: Seconds that only grow.
    """

    def __init__(
        self, stats: EngineStats | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._begin = clock()
        self._idle_before = stats.idle_seconds if stats else 0.0
        self._thread_before = stats.thread_seconds if stats else 0.0
        self._prepare_before = stats.prepare_seconds if stats else 0.0

    def waits(self, feed: RowFeed, answer_seconds: float) -> StageWaits:
        """Return the waits so far; ``answer_seconds`` is the time in which the writer waited."""
        run_seconds, stats = self._clock() - self._begin, self._stats
        return StageWaits(
            run_seconds=run_seconds,
            read_seconds=feed.read_seconds,
            window_seconds=feed.window_seconds,
            prepare_seconds=stats.prepare_seconds - self._prepare_before if stats else 0.0,
            idle_seconds=self._idle(stats, run_seconds) if stats else None,
            answer_seconds=answer_seconds,
            write_seconds=max(0.0, run_seconds - answer_seconds),
        )

    def _idle(self, stats: EngineStats, run_seconds: float) -> float:
        """Return the time without requests in this run."""
        # The engine counts its idle time when it ends, so that from before the run is among it
        before = max(0.0, stats.thread_seconds - self._thread_before - run_seconds)
        return max(0.0, stats.idle_seconds - self._idle_before - before)
