"""Progress of jobs: rates and the estimate of the time that is left; advice about waits."""

from itertools import count

import pytest

from idefics2_engine.cli.jobs.progress import JobProgress, JobTotals
from idefics2_engine.jobs.job_observer import FinishedRow
from idefics2_engine.jobs.job_result import RowCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.row_feed import RowFeed
from idefics2_engine.jobs.stage_waits import StageWaits, StageWatch
from idefics2_engine.runtime.stats import EngineStats
from idefics2_engine.sampling_params import SamplingParams
from stand_in_run import answered


class Clock:
    """Returns the time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    def __init__(self, stats: EngineStats) -> None:
        self.stats = stats


def finished(index: int, max_tokens: int | None, is_computed: bool = True) -> FinishedRow:
    params = SamplingParams(max_tokens=max_tokens)
    row = JobRow(index, index, index, "", "", "text", params)
    out = {"error": None, "usage": {"images": 2, "completion_tokens": 10}}
    return FinishedRow(row, out, answered(row.to_engine(), index) if is_computed else None, 1)


def begun(totals: JobTotals, clock: Clock) -> tuple[JobProgress, RowCounts]:
    progress = JobProgress(totals, interval=10.0, clock=clock)
    counts = RowCounts()
    progress.begin(counts)
    return progress, counts


def test_time_left_is_by_tokens_and_not_by_rows() -> None:
    """The second half of the rows has answers ten times as long."""
    clock = Clock()
    progress, counts = begun(JobTotals(20, 10 * 10 + 10 * 100), clock)
    for index in range(10):
        counts.rows += 1
        progress.finish_row(finished(index, 10))
    clock.now = 5.0
    line = progress.line()
    assert line.seconds_left == pytest.approx(50.0)
    assert line.images_per_second == 4.0
    assert line.tokens_per_second == 20.0


def test_time_left_is_by_rows_where_tokens_are_not_known() -> None:
    clock = Clock()
    progress, counts = begun(JobTotals(20, None), clock)
    counts.rows = 5
    progress.finish_row(finished(0, None))
    clock.now = 3.0
    assert progress.line().seconds_left == 45.0


def test_rows_of_the_journal_take_no_time() -> None:
    clock = Clock()
    progress, counts = begun(JobTotals(20, 200), clock)
    for index in range(10):
        counts.rows += 1
        progress.finish_row(finished(index, 10, is_computed=index == 9))
    clock.now = 2.0
    assert progress.line().seconds_left == pytest.approx(20.0)


def test_time_left_is_unknown_before_the_first_row() -> None:
    progress, _ = begun(JobTotals(20, 200), Clock())
    assert progress.line().seconds_left is None
    assert "left" not in progress.line().text()


def test_lines_come_every_interval(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress, counts = begun(JobTotals(1000, None), clock)
    for index in range(100):
        clock.now = index
        counts.rows += 1
        progress.finish_row(finished(index, 10))
    assert capsys.readouterr().err.count("\n") == 9


def test_prefix_hits_are_those_of_this_run() -> None:
    stats = EngineStats(cached_tokens=1000, computed_tokens=1000)
    progress, _ = begun(JobTotals(10, None), Clock())
    progress.load(Engine(stats))  # type: ignore[arg-type]
    assert progress.line().prefix_hits == 0.0
    stats.cached_tokens += 30
    stats.computed_tokens += 80
    stats.generated_tokens += 10
    assert progress.line().prefix_hits == pytest.approx(0.3)
    assert "prefix hits 30%" in progress.line().text()


@pytest.mark.parametrize(
    ("waits", "option"),
    [
        (StageWaits(run_seconds=100, idle_seconds=5), None),
        (StageWaits(run_seconds=2, idle_seconds=0.9), None),
        (StageWaits(run_seconds=100), None),
        (StageWaits(run_seconds=100, idle_seconds=20, window_seconds=15), "--window"),
        (StageWaits(run_seconds=100, idle_seconds=20, read_seconds=15), "-i"),
        (StageWaits(run_seconds=100, idle_seconds=20, prepare_seconds=15), "--image-threads"),
        (StageWaits(run_seconds=100, idle_seconds=20, write_seconds=15), "-o"),
        (StageWaits(run_seconds=100, idle_seconds=20), "--in-flight"),
    ],
)
def test_advice_names_the_option_to_change(waits: StageWaits, option: str | None) -> None:
    advice = waits.advice()
    if option is None:
        assert advice is None
    else:
        assert advice is not None
        assert f"{option} " in advice or advice.endswith(f"{option}.")
        assert "starved for input 20% of the time" in advice


def test_waits_are_those_of_this_run() -> None:
    stats = EngineStats(idle_seconds=50.0, prepare_seconds=7.0)
    times = iter([100.0, 104.0, 104.0])
    watch = StageWatch(stats, lambda: next(times))
    stats.idle_seconds += 3
    stats.prepare_seconds += 1
    feed = RowFeed([], begin=0, window=1, in_flight=1, find=lambda _: None, on_read=lambda _: None)
    waits = watch.waits(feed, 0.0)
    assert (waits.idle_seconds, waits.prepare_seconds) == (3.0, 1.0)
    # An engine that others used before counts its idle time until the first row
    stats.idle_seconds += 20
    stats.wait_seconds += 1
    assert watch.waits(feed, 0.0).idle_seconds == 3.0
    assert StageWatch(None).waits(feed, 0.0).idle_seconds is None


def test_clock_that_steps_back_shows_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    times = count(100, -1)
    progress = JobProgress(JobTotals(9, None), interval=5.0, clock=lambda: float(next(times)))
    progress.begin(RowCounts())
    progress.tick()
    assert "0 of 9 rows" in capsys.readouterr().err
