"""A machine for ``idefics2 doctor``: its files, packages and programs are made by the test."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from idefics2_engine.doctor.machine import Machine
from idefics2_engine.doctor.packages import Package

H200 = "0, NVIDIA H200, 9.0, 143771, 143167, 580.65.06\n"
MEMINFO = "MemTotal: 131072000 kB\nMemAvailable: 104857600 kB\n"
PTXAS = (
    "ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release 12.8, V12.8.93\n"
)
VERSIONS = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.4.6",
    "huggingface_hub": "2.4.0",
    "pyarrow": "26.0.1",
    "zstandard": "0.25.0",
    "fsspec": "2026.9.0",
    "datasets": "5.2.0",
    "llguidance": "1.9.1",
    "ray": "2.60.0",
}


def make_machine(
    folder: Path,
    *,
    smi: str | None = H200,
    versions: Mapping[str, str | None] = VERSIONS,
    cuda: str | None = "13.0",
    pin: str | None = "3.7.1",
    ptxas: str | None = PTXAS,
    meminfo: str | None = MEMINFO,
    environ: Mapping[str, str] | None = None,
) -> Machine:
    """Make a machine below ``folder``: a GPU, fitting packages, unless an argument says otherwise.

    Args:
        folder: An empty folder.
        smi: What ``nvidia-smi`` prints; ``None`` if there is none.
        versions: Versions by package; ``None`` or no entry if it is not installed.
        cuda: The CUDA version of torch, ``None`` for a CPU.
        pin: The version of Triton that torch requires, ``None`` for any.
        ptxas: What Triton's ``ptxas`` prints; ``None`` if it is missing.
        meminfo: ``/proc/meminfo``; ``None`` if there is none.
        environ: Environment variables besides ``PATH`` and ``HOME``.
    """
    site, programs = folder / "site", folder / "bin"
    for path in (site, programs, folder / "home", folder / "dev/shm"):
        path.mkdir(parents=True)
    write(site / "torch/version.py", f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n")
    if smi is not None:
        write_program(programs / "nvidia-smi", smi)
    if ptxas is not None:
        write_program(site / "triton/backends/nvidia/bin/ptxas", ptxas)
    if meminfo is not None:
        write(folder / "proc/meminfo", meminfo)
    requires = {"torch": (f"triton=={pin}; platform_system == 'Linux'",) if pin else ()}
    packages = {
        name: Package(name, version, site, requires.get(name, ()))
        for name, version in versions.items()
        if version is not None
    }
    return Machine(
        environ={"PATH": str(programs), "HOME": str(folder / "home"), **(environ or {})},
        root=folder,
        package=packages.get,
    )


def with_environ(machine: Machine, **variables: str) -> Machine:
    """Return ``machine`` with more environment variables."""
    return replace(machine, environ={**machine.environ, **variables})


def write(path: Path, text: str) -> None:
    """Write a file and the folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_program(path: Path, prints: str, *, code: int = 0, waits: bool = False) -> None:
    """Write a program that prints a text and ends with ``code``, or never ends."""
    # The machine's PATH has no other program
    end = f"exec {_path_of('sleep')} 1000" if waits else f"exit {code}"
    write(path, f"#!/bin/sh\nprintf '%s' '{prints}'\n{end}\n")
    path.chmod(0o755)


def _path_of(program: str) -> str:
    return next(
        f"{folder}/{program}"
        for folder in os.defpath.split(os.pathsep)
        if folder and os.path.exists(f"{folder}/{program}")
    )
