"""Limits that a control group sets on this process: a container's memory and processors."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from idefics2_engine.doctor.machine import Machine

_FOLDER = "sys/fs/cgroup"


def memory_left(machine: Machine) -> int | None:
    """Return the bytes that the control groups leave; ``None`` without a limit."""
    left = []
    for group in _groups(machine, ""):
        limit, used = (machine.read(f"{group}/memory.{name}") for name in ("max", "current"))
        left += _difference(limit, used)
    for group in _groups(machine, "memory"):
        names = ("limit_in_bytes", "usage_in_bytes")
        limit, used = (machine.read(f"{group}/memory.{name}") for name in names)
        left += _difference(limit, used)
    return min(left, default=None)


def cpu_quota(machine: Machine) -> float | None:
    """Return the processors that the control groups allow; ``None`` without a limit."""
    quotas = []
    for group in _groups(machine, ""):
        words = (machine.read(f"{group}/cpu.max") or "").split()
        quotas += _quotient(*words[:2]) if len(words) >= 2 else []
    for group in _groups(machine, "cpu"):
        quota, period = (machine.read(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period"))
        quotas += _quotient(quota or "", period or "")
    return min(quotas, default=None)


def _groups(machine: Machine, controller: str) -> Iterator[str]:
    """Yield the folders of this process's group and of those around it.

    ``controller`` is empty for version 2, in which all controllers are in one tree. In a container
    its own group is the root of the tree.
    """
    base = f"{_FOLDER}/{controller}".rstrip("/")
    path = PurePosixPath("/")
    for line in (machine.read("proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and controller in parts[1].split(","):
            path = PurePosixPath(parts[2])
    for group in (path, *path.parents):
        if ".." not in group.parts:
            yield f"{base}/{str(group).strip('/')}".rstrip("/")


def _difference(limit: str | None, used: str | None) -> list[int]:
    """Return the limit without what is used, or nothing if there is no limit."""
    numbers = [(text or "").strip() for text in (limit, used)]
    if not numbers[0].isdecimal() or int(numbers[0]) >= 1 << 62:
        return []
    return [max(0, int(numbers[0]) - (int(numbers[1]) if numbers[1].isdecimal() else 0))]


def _quotient(quota: str, period: str) -> list[float]:
    quota, period = quota.strip(), period.strip()
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return []
    return [int(quota) / int(period)]
