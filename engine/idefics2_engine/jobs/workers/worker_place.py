"""Where each worker computes: its GPU and its share of the cores."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_ENTRY = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
_MOST_SECONDS = 60.0


class WorkerPlace(NamedTuple):
    """Where a worker computes.

    Attributes:
        number: Number of the worker, from 0.
        device: Its entry of ``CUDA_VISIBLE_DEVICES``. None on a CPU.
        sharers: Workers on the same GPU, itself included.
        threads: Its share of the cores.
    """

    number: int
    device: str | None
    sharers: int
    threads: int

    def environment(self) -> dict[str, str]:
        """Return the variables of the worker's environment that differ from the parent's."""
        variables = dict.fromkeys(_THREADS, str(self.threads))
        return variables if self.device is None else {**variables, VISIBLE_DEVICES: self.device}


def place_workers(
    count: int | None,
    device: str = "auto",
    environ: Mapping[str, str] = os.environ,
    *,
    threads: int | None = None,
) -> list[WorkerPlace]:
    """Return a place for each worker.

    Args:
        count: Workers. If ``None``, one for each GPU, and one on a CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, as an argument of ``LLM``.
        environ: Environment of the parent, whose ``CUDA_VISIBLE_DEVICES`` holds. Its
            ``OMP_NUM_THREADS`` is the most threads of a worker.
        threads: Threads of each worker. If ``None``, its share of the cores.
    """
    devices = [] if device == "cpu" else visible_devices(environ)
    if found := re.fullmatch(r"cuda:(\d+)", device):
        devices = devices[int(found[1]) :][:1]
    count = count or len(devices) or 1
    if threads is None:
        threads = _share_of_cores(count, environ)
    if not devices:
        return [WorkerPlace(number, None, 1, threads) for number in range(count)]
    # As evenly as possible, so the first devices may have one more
    sharers = [len(range(at, count, len(devices))) for at in range(len(devices))]
    return [
        WorkerPlace(number, devices[at], sharers[at], threads)
        for number in range(count)
        for at in [number % len(devices)]
    ]


def _share_of_cores(count: int, environ: Mapping[str, str]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // count)
    most = environ.get(_THREADS[0], "")
    return min(share, int(most)) if re.fullmatch(r"[1-9]\d{0,3}", most) else share


def visible_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return an entry of ``CUDA_VISIBLE_DEVICES`` for each GPU that this process may use."""
    listed = environ.get(VISIBLE_DEVICES)
    if listed is None:
        return [str(number) for number in range(_num_gpus())]
    # CUDA ignores everything from the first invalid entry on
    return list(takewhile(_ENTRY.fullmatch, (entry.strip() for entry in listed.split(","))))


def _num_gpus() -> int:
    """Return the number of NVIDIA GPUs of the machine, without loading CUDA."""
    program = shutil.which("nvidia-smi")
    if program is None:
        # A container may have the devices and not the program
        return sum(1 for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal())
    try:
        done = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_MOST_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
