"""Checks of versions: Python, torch, Triton, whether they fit, and what the interpreter needs."""

import platform
import sys
from collections.abc import Iterator

from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.machine import Machine, ProgramError
from idefics2_engine.doctor.packages import (
    Package,
    is_for_amd,
    is_older,
    release,
    torch_cuda,
)

_TRITON_NAMES = ("triton", "pytorch-triton")
_PTXAS = "triton/backends/nvidia/bin/ptxas"


def version_checks(machine: Machine, *, has_gpu: bool) -> Iterator[Check]:
    """Yield the checks of versions."""
    torch, triton, numpy = machine.package("torch"), find_triton(machine), machine.package("numpy")
    yield python_check(sys.version_info[:3])
    yield torch_check(torch, has_gpu=has_gpu)
    yield triton_check(triton, has_gpu=has_gpu)
    yield fit_check(torch, triton)
    yield interpreter_check(machine, triton, numpy, has_gpu=has_gpu)
    yield ptxas_check(machine, triton, has_gpu=has_gpu)


def find_triton(machine: Machine) -> Package | None:
    """Return the package of Triton, which has another name beside torch's nightly builds."""
    found = (machine.package(name) for name in _TRITON_NAMES)
    return next((package for package in found if package is not None), None)


def python_check(version: tuple[int, ...]) -> Check:
    """Check the version of Python."""
    text = ".".join(map(str, version))
    details = {"version": text, "implementation": platform.python_implementation()}
    if version < facts.LEAST_PYTHON:
        least = ".".join(map(str, facts.LEAST_PYTHON))
        return Check("python", Status.PROBLEM, text, f"install Python {least} or newer", details)
    return Check("python", Status.OK, text, details=details)


def torch_check(torch: Package | None, *, has_gpu: bool) -> Check:
    """Check torch's version, and that it is built for a GPU if there is one."""
    least = facts.LEAST["torch"]
    install = f"pip install 'torch>={least}'"
    if torch is None:
        return Check("torch", Status.PROBLEM, "not installed", install, {"version": None})
    cuda, is_amd = torch_cuda(torch), is_for_amd(torch)
    build = "ROCm" if is_amd else f"CUDA {cuda}" if cuda else "CPU"
    found, details = f"{torch.version}, built for {build}", {"version": torch.version, "cuda": cuda}
    if is_older(torch.version, least):
        return Check("torch", Status.PROBLEM, f"{found}; {least} is needed", install, details)
    if is_amd:
        fix = f"{install} from PyPI, which is built for CUDA"
        return Check("torch", Status.PROBLEM, f"{found}; kernels are for CUDA", fix, details)
    if has_gpu and cuda is None:
        fix = "pip uninstall torch, then pip install torch without --index-url"
        return Check("torch", Status.PROBLEM, f"{found}: the GPU is not used", fix, details)
    return Check("torch", Status.OK, found, details=details)


def triton_check(triton: Package | None, *, has_gpu: bool) -> Check:
    """Check Triton's version."""
    least = facts.LEAST["triton"]
    install = f"pip install 'triton>={least}'"
    if triton is None:
        status = Status.PROBLEM if has_gpu else Status.WARNING
        found = "not installed: only the plain PyTorch path runs"
        fix = install if sys.platform == "linux" else "use Linux: elsewhere Triton has no wheels"
        return Check("triton", status, found, fix, {"version": None})
    details = {"version": triton.version}
    if is_older(triton.version, least):
        found = f"{triton.version}; {least} is needed"
        return Check("triton", Status.PROBLEM, found, install, details)
    return Check("triton", Status.OK, triton.version, details=details)


def fit_check(torch: Package | None, triton: Package | None) -> Check:
    """Check that Triton is the version that torch requires. CPU builds require none."""
    name = "torch and triton"
    if torch is None or triton is None:
        return Check(name, Status.OK, "not compared: one is missing", details={"pin": None})
    pin = torch.pin_of("triton") or torch.pin_of("pytorch-triton")
    details = {"pin": pin, "triton": triton.version}
    if pin is None:
        found = f"this torch requires no version of Triton, and {triton.version} is installed"
        return Check(name, Status.OK, found, details=details)
    if release(pin)[:2] != release(triton.version)[:2]:
        found = f"torch {torch.version} requires Triton {pin}, got {triton.version}"
        fix = f"pip install triton=={pin}"
        return Check(name, Status.WARNING, found, fix, details)
    return Check(name, Status.OK, f"torch requires Triton {pin}", details=details)


def interpreter_check(
    machine: Machine, triton: Package | None, numpy: Package | None, *, has_gpu: bool
) -> Check:
    """Check ``TRITON_INTERPRET``, and whether numpy fits Triton's interpreter."""
    name, value = "interpreter", machine.environ.get("TRITON_INTERPRET", "")
    details = {"TRITON_INTERPRET": value, "numpy": numpy.version if numpy else None}
    is_on = value not in ("", "0")
    if is_on and (has_gpu or value != "1"):
        found = f"TRITON_INTERPRET={value:.20} is set: kernels are not compiled"
        if value != "1":
            found = f"TRITON_INTERPRET={value:.20} is set: the kernels only know 1"
        return Check(name, Status.PROBLEM, found, "unset TRITON_INTERPRET", details)
    if numpy is None:
        fix = f"pip install 'numpy>={facts.LEAST['numpy']}'"
        return Check(name, Status.PROBLEM, "numpy is not installed", fix, details)
    if is_older(numpy.version, facts.LEAST["numpy"]):
        fix = f"pip install 'numpy>={facts.LEAST['numpy']}'"
        found = f"numpy {numpy.version}; {facts.LEAST['numpy']} is needed"
        return Check(name, Status.PROBLEM, found, fix, details)
    if (
        triton is not None
        and is_older(triton.version, facts.INTERPRETER_TRITON)
        and not is_older(numpy.version, facts.INTERPRETER_NUMPY)
    ):
        found = (
            f"fails: Triton {triton.version} cannot interpret under numpy {numpy.version}; "
            "compiled kernels do not care"
        )
        fix = f"pip install 'numpy<{facts.INTERPRETER_NUMPY}'"
        status = Status.PROBLEM if is_on else Status.WARNING
        return Check(name, status, found, fix, details)
    if is_on:
        found = "TRITON_INTERPRET=1 is set: kernels that are called run in the interpreter"
        return Check(name, Status.WARNING, found, "unset TRITON_INTERPRET", details)
    return Check(name, Status.OK, f"off; numpy {numpy.version} fits it", details=details)


def ptxas_check(machine: Machine, triton: Package | None, *, has_gpu: bool) -> Check:
    """Check the assembler that Triton compiles with."""
    if triton is None:
        return Check("ptxas", Status.OK, "not looked for: Triton is missing", details={})
    own, given = triton.folder / _PTXAS, machine.environ.get("TRITON_PTXAS_PATH")
    details = {"path": given or str(own), "version": None}
    bad = Status.PROBLEM if has_gpu else Status.WARNING
    try:
        printed = machine.run(given or str(own), "--version")
    except ProgramError as error:
        fix = "unset TRITON_PTXAS_PATH" if given else _reinstall(triton)
        return Check("ptxas", bad, f"{given or 'the one of Triton'}: {error}", fix, details)
    if printed is None and given:
        found = f"TRITON_PTXAS_PATH {given}: no such program"
        return Check("ptxas", Status.WARNING, found, "unset TRITON_PTXAS_PATH", details)
    if printed is None:
        return Check("ptxas", bad, "missing from Triton", _reinstall(triton), details)
    words = printed.replace(",", " ").split()
    version = words[words.index("release") + 1] if "release" in words[:-1] else "unknown"
    details["version"] = version
    where = f"of {given}" if given else "of Triton"
    return Check("ptxas", Status.OK, f"{version}, {where}", details=details)


def _reinstall(triton: Package) -> str:
    return f"pip install --force-reinstall --no-deps triton=={triton.version}"
