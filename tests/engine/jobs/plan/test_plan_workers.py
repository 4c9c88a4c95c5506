"""Plans of long jobs in several processes: equal to those of one process."""

from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import SamplingParams
from idefics2_engine.errors import InternalError
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.plan import plan_workers
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.plan.plan_workers import PlannerRecipe, plan_in_processes
from idefics2_engine.jobs.plan.row_batches import row_batches
from paths import DEMO
from pictures import file, noise
from planned_rows import job_rows, question


def rows_of(folder: Path, count: int) -> list[JobRow]:
    (folder / "a.png").write_bytes(file(noise(64, 50), "PNG"))
    (folder / "text.png").write_text("no image")
    pictures = (str(folder / "a.png"), file(noise(20, 90), "PNG"), str(folder / "text.png"))
    rows = job_rows(
        [question(f"Row {number}?", pictures[number % 3]) for number in range(count)],
        SamplingParams(max_tokens=7),
    )
    error = RowError("json", "parse", "line 8: must be JSON")
    rows[7] = JobRow(7, 7, "row-7", "", "in.jsonl: line 8", None, error=error)
    return rows


def recipe(folder: Path) -> PlannerRecipe:
    media = MediaConfig(allowed_media_root=folder)
    return PlannerRecipe(DEMO, None, media, 2048, SamplingParams(), ImageCheck.HEADER)


def test_processes_plan_what_one_plans(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 700)
    alone = list(plan_in_processes(rows, recipe(tmp_path), 1))
    assert [one.row for one in alone] == rows
    assert {one.error and one.error.code for one in alone} == {None, "json", "image"}
    assert list(plan_in_processes(rows, recipe(tmp_path), 2, first_batches=1)) == alone


def test_short_jobs_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_workers, "ProcessPoolExecutor", None)
    rows = rows_of(tmp_path, 600)
    assert len(list(plan_in_processes(rows, recipe(tmp_path), 8))) == 600


class EndedPool:
    """Processes that end as soon as they get rows."""

    def __init__(self, *_: object, **__: object) -> None:
        self.is_shut = False
        pools.append(self)

    def submit(self, *_: object) -> None:
        raise BrokenProcessPool

    def shutdown(self, cancel_futures: bool) -> None:
        self.is_shut = cancel_futures


pools: list[EndedPool] = []


def test_a_process_that_ended_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_workers, "ProcessPoolExecutor", EndedPool)
    rows = rows_of(tmp_path, 10)
    with pytest.raises(InternalError, match="a process that planned rows ended"):
        list(plan_in_processes(rows, recipe(tmp_path), 2, first_batches=0))
    assert pools.pop().is_shut


def test_batches_are_bounded_by_rows_and_by_bytes() -> None:
    read = []

    def counted(prompts: Iterable[Any]) -> Iterator[JobRow]:
        for row in job_rows(prompts):
            read.append(row)
            yield row

    small = [question("Small?", "a.png")] * 600
    assert [len(batch) for batch in row_batches(counted(small))] == [256, 256, 88]
    large = [question("Large?", b"x" * 2**21)] * 5
    assert [len(batch) for batch in row_batches(counted(large))] == [2, 2, 1]
    # They are read lazily
    read.clear()
    next(row_batches(counted(small)))
    assert len(read) == 256
