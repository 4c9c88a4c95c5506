"""Checks of the host and of optional packages, and what triggers their warnings."""

import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fake_machine import VERSIONS, make_machine, write
from idefics2_engine.doctor.check import Status
from idefics2_engine.doctor.host_checks import (
    LOOP_TURNS,
    cores_check,
    host_checks,
    loop_seconds,
    open_file_limit,
    open_files_check,
    shared_memory_check,
    speed_check,
    usable_cores,
)
from idefics2_engine.doctor.optional_packages import optional_packages_check

Usage = namedtuple("Usage", "total used free")


def test_loop_is_scaled_to_ten_million_turns_and_its_median_counts() -> None:
    ticks = iter([0.0, 0.02, 1.0, 1.05, 2.0, 2.03])
    assert loop_seconds(lambda: next(ticks)) == pytest.approx(0.03 * 10**7 / LOOP_TURNS)
    # Three rounds of this loop take a tenth of a second of a slow host
    assert LOOP_TURNS * 3 <= 10**7 / 5


@pytest.mark.parametrize(
    ("seconds", "has_gpu", "status"),
    [(0.3, True, "ok"), (1.3, True, "warning"), (1.3, False, "ok")],
)
def test_slow_host_is_a_warning_beside_a_gpu(seconds: float, has_gpu: bool, status: str) -> None:
    check = speed_check(seconds, has_gpu=has_gpu)
    assert check.status == status
    assert check.details == {"loop_seconds": seconds}


@pytest.mark.parametrize(
    ("usable", "quota", "has_gpu", "status", "fix"),
    [
        (16, None, True, "ok", ""),
        (2, None, True, "warning", "taskset"),
        (2, None, False, "ok", ""),
        (16, "400000 100000", True, "warning", "OMP_NUM_THREADS=4 and --image-workers 3"),
        (16, "50000 100000", False, "warning", "OMP_NUM_THREADS=1 and --image-workers 1"),
        (4, "400000 100000", True, "ok", ""),
    ],
)
def test_cores(
    tmp_path: Path, usable: int, quota: str | None, has_gpu: bool, status: str, fix: str
) -> None:
    machine = make_machine(tmp_path)
    if quota is not None:
        write(tmp_path / "sys/fs/cgroup/cpu.max", quota)
    check = cores_check(machine, usable, has_gpu=has_gpu)
    assert check.status == status
    assert fix in check.fix
    assert check.details["usable"] == usable


def test_usable_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()


@pytest.mark.parametrize(
    ("free", "has_ray", "status", "fix"),
    [
        (64 << 20, True, "warning", "--shm-size"),
        (64 << 20, False, "ok", ""),
        (8 << 30, True, "ok", ""),
        (None, True, "warning", "tmpfs"),
        (None, False, "ok", ""),
    ],
)
def test_shared_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    has_ray: bool,
    status: str,
    fix: str,
) -> None:
    versions = {**VERSIONS, "ray": "2.60.0" if has_ray else None}
    machine = make_machine(tmp_path, versions=versions)
    if free is None:
        (tmp_path / "dev/shm").rmdir()
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10 << 30, 0, free))
    check = shared_memory_check(machine)
    assert check.status == status
    assert fix in check.fix
    assert check.details["free_bytes"] == free


@pytest.mark.parametrize(
    ("limits", "status", "fix"),
    [
        ((1024, 4096), "ok", ""),
        ((256, 4096), "warning", "ulimit -n 4096"),
        ((256, 512), "warning", "ulimit -n 512"),
        ((sys.maxsize, sys.maxsize), "ok", ""),
        (None, "ok", ""),
    ],
)
def test_open_files(limits: tuple[int, int] | None, status: str, fix: str) -> None:
    check = open_files_check(limits)
    assert (check.status, check.fix) == (status, fix)


def test_limits_of_this_process() -> None:
    limits = open_file_limit()
    assert limits is not None
    assert 0 < limits[0] <= limits[1]


def test_host_has_four_checks(tmp_path: Path) -> None:
    names = [check.name for check in host_checks(make_machine(tmp_path), has_gpu=False)]
    assert names == ["host speed", "cores", "/dev/shm", "open files"]


def test_optional_packages_that_are_there(tmp_path: Path) -> None:
    check = optional_packages_check(make_machine(tmp_path))
    assert (check.status, check.fix) == (Status.OK, "")
    assert "pyarrow 26.0.1" in check.found
    assert check.details["versions"]["ray"] == "2.60.0"


def test_optional_packages_that_are_missing_or_old(tmp_path: Path) -> None:
    versions = {**VERSIONS, "ray": None, "zstandard": None}
    check = optional_packages_check(make_machine(tmp_path / "a", versions=versions))
    assert check.status is Status.OK
    assert check.found.endswith("not installed: zstandard, ray")
    assert check.fix == (
        "if you need them: install the extras 'parquet,ray' "
        "(in the checkout: pip install '.[parquet,ray]')"
    )
    versions = {**VERSIONS, "datasets": "3.9"}
    check = optional_packages_check(make_machine(tmp_path / "b", versions=versions))
    assert check.status is Status.WARNING
    assert "too old: datasets 3.9 (needs 4.0)" in check.found
    assert check.fix == (
        "install the extra 'datasets' (in the checkout: pip install '.[datasets]')"
    )
