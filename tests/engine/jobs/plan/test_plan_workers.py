"""Plans of long jobs in several processes: equal to those of one process."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from idefics2_engine import SamplingParams
from idefics2_engine.errors import InternalError
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.plan import plan_workers
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.plan.plan_workers import PlannerRecipe, plan_in_processes
from idefics2_engine.jobs.plan.row_batches import row_batches
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.rows.row_builder import IdentifiedRow
from idefics2_engine.jobs.readers.source import RawRow
from job_inputs import job_input, write_rows
from paths import DEMO
from pictures import file, noise


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> JobInput:
    """700 rows of a file, the eighth of which is no JSON."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.png").write_bytes(file(noise(64, 50), "PNG"))
    (folder / "b.png").write_bytes(file(noise(20, 90), "PNG"))
    (folder / "text.png").write_text("no image")
    pictures = ("a.png", "b.png", "text.png")
    lines: list[object] = [
        {"id": f"a{number}", "images": [pictures[number % 3]], "prompt": f"Row {number}?"}
        for number in range(700)
    ]
    lines[7] = b"{"
    return job_input(write_rows(folder / "in.jsonl", lines))


def recipe(rows: JobInput) -> PlannerRecipe:
    media = MediaConfig(allowed_media_root=rows.media_root)
    return PlannerRecipe(
        DEMO, None, media, 2048, rows.options, SamplingParams(max_tokens=7), ImageCheck.HEADER
    )


def test_processes_plan_what_one_plans(rows: JobInput) -> None:
    alone = list(plan_in_processes(rows.identified_rows(), recipe(rows), 1))
    assert [(one.number, one.id, one.place) for one in alone] == [
        (row.number, row.id, row.place) for row in rows.rows()
    ]
    assert {one.error and one.error.code for one in alone} == {None, "json", "image"}
    several = plan_in_processes(rows.identified_rows(), recipe(rows), 2, first_batches=1)
    assert list(several) == alone


def test_short_jobs_start_no_process(rows: JobInput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_workers, "ProcessPoolExecutor", None)
    assert len(list(plan_in_processes(rows.identified_rows(), recipe(rows), 8))) == 700


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


def test_a_process_that_ended_is_an_error(rows: JobInput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_workers, "ProcessPoolExecutor", EndedPool)
    with pytest.raises(InternalError, match="a process that planned rows ended"):
        list(plan_in_processes(rows.identified_rows(), recipe(rows), 2, first_batches=0))
    assert pools.pop().is_shut


def test_batches_are_bounded_by_rows_and_by_bytes() -> None:
    read = []

    def counted(count: int, columns: dict[str, Any]) -> Iterator[IdentifiedRow]:
        for number in range(count):
            read.append(number)
            yield IdentifiedRow(number, number, number, "columns", RawRow("", columns))

    small = {"prompt": "Small?", "image": "a.png"}
    assert [len(batch) for batch in row_batches(counted(600, small))] == [256, 256, 88]
    large = {"prompt": "Large?", "image": {"bytes": b"x" * 2**21, "path": None}}
    assert [len(batch) for batch in row_batches(counted(5, large))] == [2, 2, 1]
    # They are read lazily
    read.clear()
    next(row_batches(counted(600, small)))
    assert len(read) == 256
