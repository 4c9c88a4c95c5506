"""Each worker has its GPU, its share of the GPU's memory and its share of the cores."""

import os
from pathlib import Path

import pytest

from idefics2_engine.jobs.workers.engine_spec import (
    LLM_NAME,
    EngineSpec,
)
from idefics2_engine.jobs.workers.worker_place import place_workers, visible_devices
from idefics2_engine.jobs.workers.worker_pool import MAX_PREPARED_BYTES

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("0", ["0"]),
        ("3,1", ["3", "1"]),
        (" 2 , 5 ", ["2", "5"]),
        ("GPU-8932f937-d72c,MIG-GPU-1/2/3", ["GPU-8932f937-d72c", "MIG-GPU-1/2/3"]),
        # CUDA ignores what is behind an invalid entry
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_devices_are_those_that_the_parent_sees(listed: str, devices: list[str]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}) == devices


def test_devices_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ntest "$1" = -L || exit 1\n'
        'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"\necho "  MIG 1g: (UUID: MIG-1)"\n'
        'echo "GPU 1: NVIDIA H200 (UUID: GPU-2)"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_devices({}) == ["0", "1"]
    assert [place.device for place in place_workers(None, environ={})] == ["0", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "7"}) == ["7"]
    program.write_text("#!/bin/sh\necho failed\nexit 9\n")
    assert visible_devices({}) == []


def test_auto_is_one_worker_for_each_gpu_and_one_on_a_cpu() -> None:
    for device in ("auto", "cuda"):
        places = place_workers(None, device, {"CUDA_VISIBLE_DEVICES": "4,GPU-a"})
        assert [(one.number, one.device, one.sharers) for one in places] == [
            (0, "4", 1),
            (1, "GPU-a", 1),
        ]
    for device, listed in (("cpu", "4,GPU-a"), ("auto", "")):
        (place,) = place_workers(None, device, {"CUDA_VISIBLE_DEVICES": listed})
        assert (place.device, place.sharers, place.threads) == (None, 1, CORES)
    (place,) = place_workers(None, "cuda:1", {"CUDA_VISIBLE_DEVICES": "4,GPU-a"})
    assert place.device == "GPU-a"


def test_workers_share_gpus_and_cores() -> None:
    places = place_workers(5, "auto", {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert [(one.device, one.sharers) for one in places] == [
        ("2", 3),
        ("3", 2),
        ("2", 3),
        ("3", 2),
        ("2", 3),
    ]
    assert {one.threads for one in places} == {max(1, CORES // 5)}
    (place,) = place_workers(1, "cpu", {"OMP_NUM_THREADS": "1"})
    assert place.threads == 1
    (place,) = place_workers(1, "cpu", {"OMP_NUM_THREADS": "9999"})
    assert place.threads == CORES
    (place,) = place_workers(1, "cpu", {"OMP_NUM_THREADS": "4,2"})
    assert place.threads == CORES
    (place,) = place_workers(1, "cpu", {"OMP_NUM_THREADS": "1"}, threads=7)
    assert place.threads == 7


def test_environment_of_a_worker() -> None:
    (place,) = place_workers(1, "auto", {"CUDA_VISIBLE_DEVICES": "2", "OMP_NUM_THREADS": "1"})
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert place.environment() == {**threads, "CUDA_VISIBLE_DEVICES": "2"}
    (place,) = place_workers(1, "cpu", {"CUDA_VISIBLE_DEVICES": "2", "OMP_NUM_THREADS": "1"})
    assert place.environment() == threads


def test_defaults_are_those_of_llm() -> None:
    from idefics2_engine import llm
    from idefics2_engine.llm_options import LLMOptions

    assert LLMOptions().max_num_seqs is None
    assert EngineSpec().max_num_seqs(on_gpu=False) == 64
    assert EngineSpec().max_num_seqs(on_gpu=True) == 256
    assert EngineSpec({"max_num_seqs": 3}).max_num_seqs(on_gpu=True) == 3
    assert MAX_PREPARED_BYTES == llm.MAX_PREPARED_BYTES
    assert f"{llm.LLM.__module__}:{llm.LLM.__name__}" == LLM_NAME
