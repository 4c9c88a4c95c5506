"""Checks of the host: its speed in Python, cores, shared memory and open files."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from time import perf_counter

from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.control_group import cpu_quota
from idefics2_engine.doctor.machine import Machine

LOOP_TURNS = 500_000
"""Turns of the loop that is timed. ``idefics2 bench`` runs 10 million."""
_ROUNDS = 3
_BENCH_TURNS = 10**7


def host_checks(machine: Machine, *, has_gpu: bool) -> Iterator[Check]:
    """Yield the checks of the host."""
    yield speed_check(loop_seconds(), has_gpu=has_gpu)
    yield cores_check(machine, usable_cores(), has_gpu=has_gpu)
    yield shared_memory_check(machine)
    yield open_files_check(open_file_limit())


def loop_seconds(clock: Callable[[], float] = perf_counter) -> float:
    """Return the seconds of a loop of 10 million turns in Python, from the median of three parts.

    It is the loop of ``idefics2 bench`` (``loop_seconds``), with fewer turns.
    """
    times = []
    for _ in range(_ROUNDS):
        begin = clock()
        _ = [None for _ in range(LOOP_TURNS)]
        times.append(clock() - begin)
    return sorted(times)[_ROUNDS // 2] * _BENCH_TURNS / LOOP_TURNS


def usable_cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_file_limit() -> tuple[int, int] | None:
    """Return the soft and the hard limit of open files, ``None`` where there is none."""
    if sys.platform == "win32":
        return None
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in limits)
    return soft, hard


def speed_check(seconds: float, *, has_gpu: bool) -> Check:
    """Check the speed of Python, on which the host's part of a job depends."""
    details = {"loop_seconds": round(seconds, 3)}
    found = f"a loop of 10 million turns takes {seconds:.2f} s"
    if seconds > facts.SLOW_LOOP_SECONDS and has_gpu:
        fix = "end other programs, or use a host with faster cores: the GPU will wait for this one"
        return Check("host speed", Status.WARNING, found, fix, details)
    return Check("host speed", Status.OK, found, details=details)


def cores_check(machine: Machine, usable: int, *, has_gpu: bool) -> Check:
    """Check how many cores this process may use, by its affinity and its control group."""
    total, quota = os.cpu_count() or usable, cpu_quota(machine)
    details = {"total": total, "usable": usable, "cgroup_quota": quota}
    found = f"{usable} of {total} usable"
    if quota is not None and quota < usable:
        workers = max(1, int(quota) - 1)
        found += f", but the control group allows the time of {quota:g}"
        fix = (
            f"OMP_NUM_THREADS={max(1, int(quota))} and --image-workers {workers}, or a higher limit"
        )
        return Check("cores", Status.WARNING, found, fix, details)
    if has_gpu and usable < facts.FEW_CORES:
        found += ": images are decoded more slowly than a GPU encodes them"
        fix = "taskset or the scheduler's option gives a process more cores"
        return Check("cores", Status.WARNING, found, fix, details)
    return Check("cores", Status.OK, found, details=details)


def shared_memory_check(machine: Machine) -> Check:
    """Check ``/dev/shm``, which Ray uses. Image workers share anonymous memory."""
    name, folder = "/dev/shm", machine.root / "dev/shm"
    has_ray = machine.package("ray") is not None
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        found = "absent; image workers do not need it"
        status = Status.WARNING if has_ray else Status.OK
        fix = "mount a tmpfs there for Ray's object store" if has_ray else ""
        return Check(name, status, found, fix, {"total_bytes": None, "free_bytes": None})
    details = {"total_bytes": usage.total, "free_bytes": usage.free}
    found = f"{usage.free / 1e9:.2f} GB free of {usage.total / 1e9:.2f}"
    if usage.free < facts.RAY_SHARED_MEMORY and has_ray:
        fix = "docker run --shm-size=8g (or --ipc=host)"
        return Check(name, Status.WARNING, f"{found}; small for Ray's object store", fix, details)
    return Check(name, Status.OK, f"{found}; image workers do not need it", details=details)


def open_files_check(limits: tuple[int, int] | None) -> Check:
    """Check the limit of open files."""
    if limits is None:
        return Check("open files", Status.OK, "this system has no such limit")
    soft, hard = limits
    details = {"soft": soft, "hard": hard}
    found = f"at most {soft}" if soft != sys.maxsize else "no limit"
    if soft < facts.LEAST_OPEN_FILES:
        fix = f"ulimit -n {min(hard, 4 * facts.LEAST_OPEN_FILES)}"
        return Check("open files", Status.WARNING, found, fix, details)
    return Check("open files", Status.OK, found, details=details)
