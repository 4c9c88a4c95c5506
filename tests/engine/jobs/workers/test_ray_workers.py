"""Actors of Ray give what one engine gives, whatever ends them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

import ray

import ray_row_engine
from idefics2_engine import SamplingParams
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import ConfigError, PromptError, WorkerLostError
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.ray_workers import RayWorkers
from idefics2_engine.row import Row
from ray_cluster import local_ray
from stand_in_engine import NAME, answer, content

# What Ray does to itself
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray():
        yield


def workers_of(count: int, **arguments: Any) -> RayWorkers:
    return RayWorkers(EngineSpec(arguments, NAME), count)


def rows(count: int, **orders: int) -> list[Row]:
    by_number = {number: order for order, number in orders.items()}
    return [
        Row(f"row {number}", {"prompt": f"{number}?", "order": by_number.get(number)})
        for number in range(count)
    ]


def test_an_actor_that_is_killed_costs_no_row(tmp_path: Path) -> None:
    all_rows = rows(400, error=50)
    arguments = {"killed": str(tmp_path / "killed"), "key": "row 200"}
    with RayWorkers(EngineSpec(arguments, ray_row_engine.NAME), 2) as workers:
        outputs = list(workers.iterate(all_rows))
        assert workers.num_deaths == 1
    # The cluster was there before, so it is left as it was
    assert ray.is_initialized()
    outputs.sort(key=lambda one: int(one.request_id))
    assert isinstance(outputs.pop(50).error, PromptError)
    wanted = [content(answer(row, place)) for place, row in enumerate(all_rows) if place != 50]
    assert [content(output) for output in outputs] == wanted


def test_a_row_that_kills_its_actor_is_lost_alone() -> None:
    with workers_of(2) as workers:
        outputs = list(workers.iterate(rows(60, kill=7)))
        assert workers.num_deaths == 3
    assert sorted(int(output.request_id) for output in outputs) == list(range(60))
    (lost,) = [output for output in outputs if output.error]
    assert lost.key == "row 7"
    assert isinstance(lost.error, WorkerLostError)


def test_an_engine_that_cannot_be_built_raises_its_error() -> None:
    with (
        workers_of(1, fails="config") as workers,
        pytest.raises(ConfigError, match="model must be a folder, got 'nowhere'"),
    ):
        list(workers.iterate(rows(3)))


def test_the_demo_model_answers_on_an_actor() -> None:
    parts = [
        {"type": "image", "image": str(DEMO_IMAGES / "shapes.png")},
        {"type": "text", "text": "Where is the star?"},
    ]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    row = Row("star", [{"role": "user", "content": parts}], params)
    with RayWorkers(EngineSpec({"device": "cpu"})) as workers:
        (output,) = workers.iterate([row])
    assert (output.key, output.error) == ("star", None)
    assert output.outputs[0].text == "The star is at the top right."


def test_a_cluster_is_started_and_left_and_signals_are_the_jobs_own() -> None:
    code = """
import signal, ray
from idefics2_engine.jobs.workers.ray_workers import RayWorkers
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.row import Row

signal.signal(signal.SIGTERM, handler := lambda *_: None)
workers = RayWorkers(EngineSpec({}, "stand_in_engine:StandInEngine"), 1)
assert not ray.is_initialized()
outputs = list(workers.iterate([Row(1, "text")]))
assert ray.is_initialized()
assert signal.getsignal(signal.SIGTERM) is handler
workers.close()
assert not ray.is_initialized()
print(outputs[0].key)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "1\n"


def test_an_address_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_options: Any) -> None:
        # What ray.init does, at once
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="must be that of a running cluster, got 'here:1'"):
        RayWorkers(EngineSpec({}, NAME), address="here:1")


@pytest.mark.parametrize("options", [{"count": 0}, {"num_cpus": 0}])
def test_other_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        RayWorkers(EngineSpec({}, NAME), **options)
