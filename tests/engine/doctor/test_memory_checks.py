"""Checks of memory: the formulas against a real model, and what fits."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_machine import make_machine, write
from idefics2_engine import LLM
from idefics2_engine.checkpoint.loader import build_model
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Status
from idefics2_engine.doctor.control_group import cpu_quota, memory_left
from idefics2_engine.doctor.gpu_query import Gpu
from idefics2_engine.doctor.memory_checks import (
    gpu_memory_check,
    host_memory_check,
    memory_checks,
)
from idefics2_engine.doctor.model_memory import (
    IDEFICS2_8B,
    download_bytes,
    memory_need,
    weight_bytes,
)
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.quantization import Quantization
from idefics2_engine.runtime import image_graphs
from idefics2_kernels import REFERENCE
from idefics2_kernels.nf4 import nf4_weight
from paths import EIGHT_B

GIB = 1 << 30
DEMO = ModelConfig.load(DEMO_MODEL)


def gpu(gigabytes: float, used: float = 0.0) -> Gpu:
    total = int(gigabytes * 1e9)
    return Gpu("NVIDIA H200", 90, total, total - int(used * 1e9))


def test_shape_of_the_8b_model_is_that_of_its_config() -> None:
    assert ModelConfig.load(EIGHT_B) == IDEFICS2_8B
    assert download_bytes(IDEFICS2_8B) == 4 * 8_402_768_112


def test_dense_weights_have_the_bytes_of_the_model() -> None:
    model = build_model(IDEFICS2_8B, REFERENCE, "meta", torch.bfloat16)
    assert weight_bytes(IDEFICS2_8B, 2) == sum(p.nbytes for p in model.parameters())
    demo = build_model(DEMO, REFERENCE, "meta", torch.float32)
    assert weight_bytes(DEMO, 4) == demo.num_bytes


def test_nf4_weights_have_the_bytes_of_the_model() -> None:
    model = build_model(DEMO, REFERENCE, "cpu", torch.bfloat16, Quantization())
    model.init_weights(double_quant=True)
    # The table of nested codes, 1 KiB a weight, may be shared by weights side by side
    assert weight_bytes(DEMO, 2, nf4=True) == pytest.approx(model.num_bytes, rel=0.02)


def test_memory_of_the_8b_model_is_what_was_measured() -> None:
    """The figures are those of docs/benchmarks.md and ``beside_GB`` of its results file."""
    bf16, nf4 = (memory_need(IDEFICS2_8B, nf4=kind) for kind in (False, True))
    assert bf16.weights == pytest.approx(16.8e9, rel=0.002)
    assert nf4.weights == pytest.approx(4.74e9, rel=0.002)
    assert bf16.token == 128 << 10
    assert bf16.beside == pytest.approx(1.445e9, rel=0.15)


def test_facts_are_those_of_the_engine() -> None:
    default = inspect.signature(LLM).parameters["gpu_memory_utilization"].default
    assert default == facts.MEMORY_UTILIZATION
    assert image_graphs.MAX_PATCHES == facts.GRAPH_PATCHES
    assert (nf4_weight.BLOCK, nf4_weight.NESTED_BLOCK) == (facts.NF4_BLOCK, facts.NF4_NESTED_BLOCK)
    (prepared,) = (f.default for f in fields(JobOptions) if f.name == "max_prepared_bytes")
    assert prepared == facts.PREPARED_BYTES


@pytest.mark.parametrize(
    ("gpus", "status", "found", "fix"),
    [
        ((gpu(150),), "ok", "bf16 has room for", ""),
        ((gpu(26),), "ok", "bf16 has room for", ""),
        ((gpu(24),), "warning", "does not fit", "--max-model-len 24"),
        ((gpu(16),), "warning", "does not fit", "--quantization nf4"),
        ((gpu(8),), "warning", "does not fit", "--quantization nf4 --max-model-len "),
        ((gpu(6),), "problem", "too little, even in NF4", "more memory"),
        ((gpu(80, used=70),), "problem", "other processes leave too little", "nvidia-smi"),
        ((gpu(80, used=50),), "warning", "does not fit", "--max-model-len"),
        ((gpu(80), gpu(6)), "problem", "too little, even in NF4", "more memory"),
        ((Gpu("NVIDIA GB10", 121),), "ok", "the memory is not known", ""),
        ((), "ok", "no GPU", ""),
    ],
)
def test_gpu_memory(gpus: tuple[Gpu, ...], status: str, found: str, fix: str) -> None:
    check = gpu_memory_check(IDEFICS2_8B, "idefics2-8b", gpus)
    assert check.status == status
    assert found in check.found
    assert fix in check.fix
    assert bool(fix) == bool(check.fix)
    assert "bf16 (weights 16.8 GB)" in check.found
    assert "NF4 (weights 4.74 GB)" in check.found


def test_lengths_in_fixes_fit() -> None:
    (found,) = {gpu_memory_check(IDEFICS2_8B, "m", (gpu(24),)).fix}
    length = int(found.split(" or ")[0].removeprefix("--max-model-len "))
    need = memory_need(IDEFICS2_8B, nf4=False)
    usable = int(facts.MEMORY_UTILIZATION * 24e9)
    assert need.whole(length) <= usable < need.whole(length + 64)
    assert length % 64 == 0


def test_a_small_model_fits_everywhere() -> None:
    assert gpu_memory_check(DEMO, "demo", (gpu(6),)).status is Status.OK


@pytest.mark.parametrize(
    ("available", "has_gpu", "status", "fix"),
    [
        (100, True, "ok", ""),
        (3, True, "warning", "max_prepared_bytes"),
        (100, False, "ok", ""),
        (20, False, "warning", "add --dtype bfloat16 to idefics2 run"),
        (10, False, "warning", "demo checkpoint"),
    ],
)
def test_host_memory(tmp_path: Path, available: int, has_gpu: bool, status: str, fix: str) -> None:
    meminfo = f"MemTotal: 200000000 kB\nMemAvailable: {available * GIB >> 10} kB\n"
    machine = make_machine(tmp_path, meminfo=meminfo)
    check = host_memory_check(machine, IDEFICS2_8B, "idefics2-8b", has_gpu=has_gpu)
    assert check.status == status
    assert fix in check.fix
    assert check.details["available_bytes"] == available * GIB


def test_host_without_meminfo(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, meminfo=None)
    check = host_memory_check(machine, IDEFICS2_8B, "m", has_gpu=True)
    assert (check.status, check.found) == (Status.OK, "unknown: there is no /proc/meminfo")


def test_a_control_group_limits_the_host(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    write(tmp_path / "sys/fs/cgroup/memory.max", f"{4 * GIB}\n")
    write(tmp_path / "sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
    check = list(memory_checks(machine, IDEFICS2_8B, "m", (gpu(150),)))[1]
    assert check.status is Status.WARNING
    assert check.found.startswith("1.07 GB available, by the limit of the control group")


VERSION_1 = "6:memory:/docker/one\n5:cpu,cpuacct:/docker/one\n0::/\n"


@pytest.mark.parametrize(
    ("files", "memory", "cpus"),
    [
        ({}, None, None),
        ({"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ({"memory.max": "1000", "cpu.max": "150000 100000"}, 1000, 1.5),
        ({"memory.max": "1000", "memory.current": "1200"}, 0, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "a/memory.max": "500",
                "a/b/memory.max": "900",
                "a/b/cpu.max": "300000 100000",
                "a/cpu.max": "50000 100000",
            },
            500,
            0.5,
        ),
        ({"proc/self/cgroup": "0::/../../up\n", "memory.max": "700"}, 700, None),
        (
            {
                "proc/self/cgroup": VERSION_1,
                "memory/docker/one/memory.limit_in_bytes": "4000",
                "memory/docker/one/memory.usage_in_bytes": "1000",
                "cpu/docker/one/cpu.cfs_quota_us": "200000",
                "cpu/docker/one/cpu.cfs_period_us": "100000",
            },
            3000,
            2.0,
        ),
        (
            {
                "proc/self/cgroup": VERSION_1,
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            None,
            None,
        ),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, files: dict[str, str], memory: int | None, cpus: float | None
) -> None:
    machine = make_machine(tmp_path)
    for name, text in files.items():
        folder = tmp_path if name.startswith("proc/") else tmp_path / "sys/fs/cgroup"
        write(folder / name, text + "\n")
    assert memory_left(machine) == memory
    assert cpu_quota(machine) == cpus


def test_details_are_numbers(tmp_path: Path) -> None:
    check = gpu_memory_check(IDEFICS2_8B, "m", (gpu(150),))
    kinds: dict[str, Any] = {kind: check.details[kind] for kind in ("bf16", "nf4")}
    for values in kinds.values():
        assert all(type(value) is int and value > 0 for value in values.values())
