"""Checks of GPUs: ``nvidia-smi``, ``/proc``, the driver, and the kernels that run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fake_machine import H200, make_machine, with_environ, write, write_program
from idefics2_engine.doctor.check import Status
from idefics2_engine.doctor.gpu_checks import driver_check, gpu_check, gpu_checks, kernels_check
from idefics2_engine.doctor.gpu_query import Gpu, Gpus, query_gpus
from idefics2_kernels.catalog import CATALOG
from paths import TESTS

A100 = "1, NVIDIA A100-SXM4-40GB, 8.0, 40960, 40330, 580.65.06\n"
NVRM = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build\n"


def test_nvidia_smi_describes_gpus(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, smi=H200 + A100)
    found = query_gpus(machine)
    assert found == Gpus(
        (
            Gpu("NVIDIA H200", 90, 143771 << 20, 143167 << 20),
            Gpu("NVIDIA A100-SXM4-40GB", 80, 40960 << 20, 40330 << 20),
        ),
        "580.65.06",
        "nvidia-smi",
    )
    check = gpu_check(machine, found)
    assert check.status is Status.OK
    assert check.found.startswith("NVIDIA H200 (sm_90) 150.8 GB, 150.1 GB free, NVIDIA A100")


def test_a_capability_or_memory_that_is_not_known(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, smi="0, NVIDIA Thing, [N/A], [N/A], [N/A], 580.1\n")
    found = query_gpus(machine)
    assert found.gpus == (Gpu("NVIDIA Thing"),)
    check = kernels_check(found.gpus)
    assert check.status is Status.WARNING
    assert "unknown" in check.found


def test_no_gpu_is_a_clear_line(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, smi=None)
    found = query_gpus(machine)
    checks = {check.name: check for check in gpu_checks(machine, found)}
    assert found == Gpus()
    assert checks["gpu"].status is Status.WARNING
    assert checks["gpu"].found == "none: there is neither nvidia-smi nor /proc/driver/nvidia"
    assert checks["gpu"].fix
    assert checks["driver"].status is Status.OK
    assert checks["kernels"].found.startswith("none run without a GPU")


def test_nvidia_smi_that_hangs_or_fails_is_a_problem(tmp_path: Path) -> None:
    machine = replace(make_machine(tmp_path), timeout=0.3)
    write_program(tmp_path / "bin/nvidia-smi", "", waits=True)
    found = query_gpus(machine)
    assert found.trouble == "did not answer in 0.3 s"
    assert gpu_check(machine, found).status is Status.PROBLEM
    message = "NVIDIA-SMI has failed because it could not communicate with the driver."
    write_program(tmp_path / "bin/nvidia-smi", message, code=9)
    check = gpu_check(machine, query_gpus(replace(machine, timeout=60)))
    assert check.status is Status.PROBLEM
    assert f"failed with exit code 9: {message}" in check.found


def test_proc_describes_gpus_without_nvidia_smi(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, smi=None)
    write(tmp_path / "proc/driver/nvidia/version", NVRM)
    write(
        tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information",
        "Model: \t\t NVIDIA L4\nIRQ: 1\n",
    )
    found = query_gpus(machine)
    assert found == Gpus((Gpu("NVIDIA L4"),), "535.129.03", "/proc/driver/nvidia")
    assert gpu_check(machine, found).status is Status.OK


def test_proc_is_used_if_nvidia_smi_fails(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    write_program(tmp_path / "bin/nvidia-smi", "bad", code=1)
    write(tmp_path / "proc/driver/nvidia/version", NVRM)
    write(tmp_path / "proc/driver/nvidia/gpus/0/information", "Model: NVIDIA L4\n")
    check = gpu_check(machine, query_gpus(machine))
    assert check.status is Status.WARNING
    assert check.found == "NVIDIA L4; nvidia-smi failed with exit code 1: bad"


@pytest.mark.parametrize(
    ("visible", "status"), [("", "problem"), ("-1", "problem"), ("0", "ok"), ("0,1", "ok")]
)
def test_cuda_visible_devices(tmp_path: Path, visible: str, status: str) -> None:
    machine = with_environ(make_machine(tmp_path), CUDA_VISIBLE_DEVICES=visible)
    check = gpu_check(machine, query_gpus(machine))
    assert check.status == status
    assert "CUDA_VISIBLE_DEVICES" in check.found


@pytest.mark.parametrize(
    ("driver", "cuda", "status"),
    [
        ("580.65.06", "13.0", "ok"),
        ("580.65.05", "13.0", "problem"),
        ("570.124.06", "13.0", "problem"),
        ("570.124.06", "12.8", "ok"),
        ("525.60.13", "12.8", "ok"),
        ("520.10.01", "12.6", "problem"),
        ("520.10.01", "99.0", "ok"),
        ("520.10.01", None, "ok"),
    ],
)
def test_driver_fits_the_cuda_of_torch(
    tmp_path: Path, driver: str, cuda: str | None, status: str
) -> None:
    machine = make_machine(tmp_path, cuda=cuda)
    check = driver_check(machine, Gpus((Gpu("NVIDIA H200"),), driver, "nvidia-smi"))
    assert check.status == status
    assert bool(check.fix) == (status == "problem")


@pytest.mark.parametrize(
    ("name", "capability", "status", "kind", "found"),
    [
        ("NVIDIA H200", 90, "ok", "gluon", "Gluon and plain Triton, tuned on H100"),
        ("NVIDIA H100 80GB HBM3", 90, "ok", "gluon", "measured on H100 and H200"),
        ("NVIDIA GH200 480GB", 90, "warning", "gluon", "not measured on NVIDIA GH200 480GB"),
        ("NVIDIA A100", 80, "warning", "plain", "compiled in tests for sm_80"),
        ("NVIDIA L4", 89, "warning", "plain", "neither compiled in tests for sm_89"),
        ("NVIDIA B200", 100, "warning", "plain", "neither compiled in tests for sm_100"),
        ("Tesla T4", 75, "problem", "none", "sm_75 is too old"),
    ],
)
def test_kernels_of_a_gpu(name: str, capability: int, status: str, kind: str, found: str) -> None:
    check = kernels_check((Gpu(name, capability),))
    assert check.status == status
    assert check.details["kinds"] == [kind]
    assert found in check.found


def test_the_worst_of_several_gpus_counts() -> None:
    check = kernels_check((Gpu("NVIDIA H200", 90), Gpu("Tesla T4", 75)))
    assert check.status is Status.PROBLEM
    assert check.details["kinds"] == ["gluon", "none"]


# The kernels are asked for GPUs that the machine need not have
ROUTES = """
import json
from triton.runtime import driver
from absent_gpu import AbsentGPU
from idefics2_engine.doctor.kernel_routes import kernel_routes, launch_configs, summary
for arch in (75, 80, 90, 100):
    driver.set_active(AbsentGPU(arch))
    routes = kernel_routes()
    print(json.dumps([arch, routes, summary(routes), len(launch_configs(arch))]))
"""
KINDS = {75: {"none"}, 80: {"plain"}, 90: {"gluon", "plain"}, 100: {"plain"}}


def test_kernels_are_asked_which_of_them_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(TESTS / "tools")])
    monkeypatch.setenv("PYTHONPATH", paths)
    command = [sys.executable, "-c", ROUTES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = {line[0]: line[1:] for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == list(KINDS)
    for arch, (routes, _, num_configs) in lines.items():
        assert set(routes) == {spec.name for spec in CATALOG}
        assert {kind for counts in routes.values() for kind in counts} == KINDS[arch]
        assert num_configs == 6
    hopper, text, _ = lines[90]
    assert text.startswith("Gluon in flash_attention, paged_attention, nf4_matmul; plain Triton")
    # Decoding has no Gluon kernel, and every product has one
    assert hopper["paged_attention"]["plain"] >= 5
    assert set(hopper["nf4_matmul"]) == {"gluon"}
