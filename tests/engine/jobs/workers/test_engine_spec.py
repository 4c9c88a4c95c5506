"""A worker builds its engine with its share of the GPU and the cores."""

from pathlib import Path
from typing import Any

import pytest
import torch

from idefics2_engine import llm
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.workers.engine_spec import EngineSpec, build_engine, memory_share
from idefics2_engine.jobs.workers.worker_place import WorkerPlace

CPU = WorkerPlace(0, None, 1, 4)
GPU = WorkerPlace(1, "GPU-a", 1, 6)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of threads that are set, without setting them."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


def arguments(monkeypatch: pytest.MonkeyPatch, place: WorkerPlace, **given: Any) -> dict[str, Any]:
    """Return the arguments with which ``LLM`` is called in a worker."""
    got: dict[str, Any] = {}
    monkeypatch.setattr(llm, "LLM", lambda **arguments: got.update(arguments))
    build_engine(EngineSpec(given), place)
    return got


def test_small_model_has_one_thread_and_others_their_share(
    monkeypatch: pytest.MonkeyPatch, threads: list[int], tmp_path: Path
) -> None:
    # Only the size of the weights counts here, and the file has a hole of this size
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 28)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    arguments(monkeypatch, CPU, model=str(DEMO_MODEL))
    assert threads == [1]
    arguments(monkeypatch, CPU, model=str(tmp_path))
    arguments(monkeypatch, GPU, model="folder without weights", load_format="dummy")
    assert threads == [1, 4, 6]


def test_images_are_read_with_the_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    assert arguments(monkeypatch, CPU, seed=3) == {"seed": 3, "image_threads": 4}
    assert arguments(monkeypatch, GPU) == {"image_threads": 6, "image_workers": 5}
    assert arguments(monkeypatch, GPU._replace(threads=1))["image_workers"] == 1
    many = arguments(monkeypatch, GPU._replace(threads=64))
    assert (many["image_threads"], many["image_workers"]) == (8, 8)
    given = {"image_threads": 2, "image_workers": 0}
    assert arguments(monkeypatch, GPU, **given) == given


def test_only_visible_device_is_the_one_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    assert arguments(monkeypatch, GPU, device="cuda:3")["device"] == "cuda"
    assert arguments(monkeypatch, CPU, device="cuda:3")["device"] == "cuda:3"


def test_memory_of_a_gpu_is_shared(monkeypatch: pytest.MonkeyPatch, threads: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (600, 1000))
    shared = GPU._replace(sharers=3)
    name = "gpu_memory_utilization"
    assert arguments(monkeypatch, shared)[name] == pytest.approx(0.7)
    assert arguments(monkeypatch, shared, **{name: 0.6})[name] == pytest.approx(0.6)
    assert name not in arguments(monkeypatch, GPU)


def test_engines_on_one_gpu_add_up_to_the_bound() -> None:
    # The first engine counts from nothing, the second from what the first has
    assert memory_share(0.9, 2, free=1000, total=1000) == pytest.approx(0.45)
    assert memory_share(0.9, 2, free=550, total=1000) == pytest.approx(0.9)
    # A third process on the device does not raise the bound
    assert memory_share(0.9, 2, free=300, total=1000) == pytest.approx(0.9)


def test_missing_model_is_the_error_of_llm(tmp_path: Path, threads: list[int]) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        build_engine(EngineSpec({"model": str(tmp_path / "nowhere")}), CPU)
