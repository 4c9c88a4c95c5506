"""The machine as the checks see it: its files, its environment and its programs."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from idefics2_engine.doctor.packages import Package, find_package

# A driver that hangs must not hang the report
_TIMEOUT = 10.0
# Files below /proc and /sys are small
_MOST_BYTES = 1 << 20


class ProgramError(Exception):
    """A program did not answer. The message says why, after the program's name."""


@dataclass(frozen=True)
class Machine:
    """Where the checks look. Tests give other places.

    Attributes:
        environ: Environment variables.
        root: The folder that has ``proc``, ``sys`` and ``dev``.
        package: Finds an installed package by its name, ``None`` if there is none.
        timeout: Seconds that a program may take.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")
    package: Callable[[str], Package | None] = find_package
    timeout: float = _TIMEOUT

    @property
    def home(self) -> Path:
        """The user's home folder."""
        return Path(self.environ.get("HOME") or os.path.expanduser("~"))

    def read(self, name: str) -> str | None:
        """Return the text of a file of the system, such as ``proc/meminfo``; ``None`` without."""
        try:
            with open(self.root / name, encoding="utf-8", errors="replace") as file:
                return file.read(_MOST_BYTES)
        except (OSError, ValueError):
            return None

    def run(self, program: str, *arguments: str) -> str | None:
        """Return what a program prints, ``None`` if there is no such program.

        Raises:
            ProgramError: It fails or takes too long.
        """
        found = shutil.which(program, path=self.environ.get("PATH", os.defpath))
        if found is None:
            return None
        try:
            done = subprocess.run(
                [found, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ProgramError(f"did not answer in {self.timeout:g} s") from None
        except OSError as error:
            raise ProgramError(f"cannot be run: {error.strerror or error}") from None
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            raise ProgramError(f"failed with exit code {done.returncode}: {lines[0]:.200}")
        return done.stdout
