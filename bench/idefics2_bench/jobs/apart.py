"""Programs in a process of their own, whose time and memory are measured."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from idefics2_bench.jobs.memory import family_peak_bytes
from idefics2_engine.errors import Idefics2Error

# Between two looks at the memory of a program
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        seconds: Duration, with the start of Python.
        cpu_seconds: CPU time of all its threads, and of the processes that it started.
        peak_bytes: Most memory that it had, with the processes that it started.
        output: What it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def run_apart(module: str, arguments: Sequence[str], codes: Sequence[int] = (0,)) -> Ended:
    """Run ``python -m module`` with ``arguments`` to its end.

    Raises:
        Idefics2Error: Its exit code is none of ``codes``.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = start_apart(module, arguments, stdout=output, stderr=errors)
        peak = _Peak(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        peak.end()
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, errors):
            file.seek(0)
        if process.returncode not in codes:
            raise Idefics2Error(
                f"{module} must end with {codes}, got {process.returncode}: {errors.read()[-2000:]}"
            )
        cpu = usage.ru_utime + usage.ru_stime
        return Ended(seconds, cpu, peak.num_bytes, output.read())


def start_apart(module: str, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start ``python -m module`` with the modules of this process; ``options`` are of ``Popen``."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        **options,
    )


class _Peak:
    """Looks at the memory of a process on a thread, until its end.

    Attributes:
        num_bytes: Most bytes so far.
    """

    def __init__(self, process: int) -> None:
        self.num_bytes = 0
        self._process = process
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._has_ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._has_ended.wait(_LOOK_SECONDS):
            self.num_bytes = max(self.num_bytes, family_peak_bytes(self._process))
