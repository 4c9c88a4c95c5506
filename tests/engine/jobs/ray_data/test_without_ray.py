"""What of the Ray modules needs no Ray: their imports, their checks and their messages."""

import subprocess
import sys
from typing import Any

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.ray_data import Idefics2ProcessorConfig, build_processor


def test_ray_is_not_imported_with_the_modules() -> None:
    code = (
        "import sys, idefics2_engine.jobs.ray_data, idefics2_engine.jobs.workers.ray_workers; "
        "print(sys.modules.keys() & {'ray', 'torch', 'pyarrow', 'msgpack'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_missing_ray_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[ray\]'"):
        build_processor(Idefics2ProcessorConfig())


def test_only_a_config_is_accepted() -> None:
    with pytest.raises(ConfigError, match="config must be an Idefics2ProcessorConfig, got 'demo'"):
        build_processor("demo")  # type: ignore[arg-type]


def test_an_actor_has_a_gpu_unless_it_computes_on_the_cpu() -> None:
    assert Idefics2ProcessorConfig().gpus == 1
    assert Idefics2ProcessorConfig(engine_kwargs={"device": "cpu"}).gpus == 0
    assert Idefics2ProcessorConfig(num_gpus=0.5).gpus == 0.5


def test_an_actor_has_little_more_than_the_batches_that_it_answers_at_once() -> None:
    assert Idefics2ProcessorConfig().tasks_in_flight == 9
    assert Idefics2ProcessorConfig(max_concurrent_batches=2).tasks_in_flight == 3
    assert Idefics2ProcessorConfig(max_tasks_in_flight_per_actor=20).tasks_in_flight == 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"concurrency": (3, 2)}, "concurrency must be an integer of at least 3, got 2"),
        ({"max_concurrent_batches": "8"}, "max_concurrent_batches must be an integer"),
        ({"max_task_retries": -2}, "max_task_retries must be an integer of at least -1"),
        ({"engine_kwargs": {"model": "x"}}, "engine_kwargs must not have 'model'"),
    ],
)
def test_other_configs_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Idefics2ProcessorConfig(**options)
