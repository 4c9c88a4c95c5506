"""The progress of a job: a bar on a terminal, and a line every few seconds elsewhere."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_result import RowCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.runtime.stats import EngineStats
from idefics2_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tqdm import tqdm  # type: ignore[import-untyped]

_DEFAULT_TOKENS = SamplingParams().max_tokens or 1


@dataclass(frozen=True)
class JobTotals:
    """What a job has in all.

    Attributes:
        rows: Rows.
        answer_tokens: Most tokens of all answers; ``None`` if a row has no limit.
    """

    rows: int
    answer_tokens: int | None


def answer_tokens(row: JobRow) -> int | None:
    """Return the most tokens of the answers to a row, ``None`` if it has no limit."""
    if row.prompt is None:
        return 0
    params = row.sampling_params
    if params is None:
        return _DEFAULT_TOKENS
    return None if params.max_tokens is None else params.n * params.max_tokens


@dataclass(frozen=True)
class ProgressLine:
    """The progress of a job at one moment.

    Attributes:
        rows: Finished rows.
        of: All rows.
        errors: Error rows.
        images_per_second: Images of rows that this run computed.
        tokens_per_second: Tokens of answers that it generated.
        prefix_hits: Share of prompt tokens that came from the prefix cache. ``None`` if the engine
            does not say.
        seconds_left: Estimate. ``None`` before this run has computed a row.
    """

    rows: int
    of: int
    errors: int
    images_per_second: float
    tokens_per_second: float
    prefix_hits: float | None
    seconds_left: float | None

    def rates(self) -> str:
        """Return what is done a second, as text."""
        hits = "" if self.prefix_hits is None else f", prefix hits {self.prefix_hits:.0%}"
        return (
            f"{self.errors} errors, {self.images_per_second:.1f} images/s, "
            f"{self.tokens_per_second:.0f} new tokens/s{hits}"
        )

    def text(self) -> str:
        """Return the line."""
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        return f"{self.rows} of {self.of} rows, {self.rates()}{left}"

    def json(self) -> str:
        """Return the line as a JSON object."""
        rounded = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }
        return json.dumps({"event": "progress", **rounded})


class JobProgress(JobObserver):
    """Shows the progress on standard error.

    Args:
        totals: What the job has in all.
        interval: Seconds between lines.
        as_json: Whether lines are JSON, also on a terminal.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        totals: JobTotals,
        *,
        interval: float,
        as_json: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = totals
        self._interval = interval
        self._as_json = as_json
        self._clock = clock
        self._counts = RowCounts()
        self._bar: tqdm | None = None
        self._stats: EngineStats | None = None
        self._before = EngineStats()
        self._begin = self._last = clock()
        # Of rows that this run computed, and of all finished rows
        self._images = self._tokens = self._computed = 0
        self._computed_budget = self._finished_budget = 0

    def begin(self, counts: RowCounts) -> None:
        """Begin with the counts of a run."""
        self._counts = counts
        if sys.stderr.isatty() and not self._as_json:
            from tqdm import tqdm

            self._bar = tqdm(total=self._totals.rows, unit="row", dynamic_ncols=True)
            # The estimate by rows would contradict the one by tokens
            self._bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._begin = self._last = self._clock()

    def load(self, engine: RowEngine) -> None:
        """Count from here on, where the engine is there."""
        stats = getattr(engine, "stats", None)
        if isinstance(stats, EngineStats):
            self._stats, self._before = stats, replace(stats)
        self._begin = self._clock()

    def finish_row(self, finished: FinishedRow) -> None:
        """Count a row, and show the progress if it is time."""
        budget = answer_tokens(finished.row) or 0
        self._finished_budget += budget
        if finished.answer is not None:
            usage = finished.out.get("usage") or {}
            self._computed += 1
            self._computed_budget += budget
            self._images += usage.get("images", 0)
            self._tokens += usage.get("completion_tokens", 0)
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(), refresh=False)
            self._bar.update(1)
        else:
            self.tick()

    def tick(self) -> None:
        """Show the progress if it is time."""
        if self._bar is not None:
            self._bar.refresh()
        elif not 0 <= self._clock() - self._last < self._interval:
            self._last = self._clock()
            line = self.line()
            print(line.json() if self._as_json else f"idefics2: {line.text()}", file=sys.stderr)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def line(self) -> ProgressLine:
        """Return the progress."""
        seconds = max(1e-9, self._clock() - self._begin)
        return ProgressLine(
            rows=self._counts.rows,
            of=self._totals.rows,
            errors=self._counts.num_errors,
            images_per_second=self._images / seconds,
            tokens_per_second=self._tokens / seconds,
            prefix_hits=self._prefix_hits(),
            seconds_left=self._seconds_left(seconds),
        )

    def _prefix_hits(self) -> float | None:
        if self._stats is None:
            return None
        hits = self._stats.cached_tokens - self._before.cached_tokens
        generated = self._stats.generated_tokens - self._before.generated_tokens
        computed = self._stats.computed_tokens - self._before.computed_tokens - generated
        return hits / (hits + computed) if hits > 0 else 0.0

    def _seconds_left(self, seconds: float) -> float | None:
        """Return an estimate by the tokens that answers may have, or by rows if that is unknown."""
        if not self._computed:
            return None
        total = self._totals.answer_tokens
        if total is None or not self._computed_budget:
            return (self._totals.rows - self._counts.rows) * seconds / self._computed
        return max(0, total - self._finished_budget) * seconds / self._computed_budget

    def _postfix(self) -> str:
        line = self.line()
        left = "" if line.seconds_left is None else f", {_duration(line.seconds_left)} left"
        return line.rates() + left


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
