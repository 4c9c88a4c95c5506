"""The checks that need torch and Triton, made by a process of their own (``deep_child``)."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.machine import Machine

SECONDS = 180.0
"""Importing torch from a cold disk and compiling three kernels takes less."""
NAMES = ("torch import", "cuda", "kernels here", "kernel results")
"""The checks that the process makes, in order."""

_PACKAGES = Path(__file__).resolve().parents[2]
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from idefics2_engine.doctor.deep_child import main; main()"
)


def deep_checks(machine: Machine, seconds: float = SECONDS, boot: str = _BOOT) -> Iterator[Check]:
    """Yield the checks of a child process, and a problem if it does not make all of them.

    Args:
        machine: The machine, of which the child gets the environment.
        seconds: Most seconds that the child may take.
        boot: The child's program, whose argument is the module path in JSON.
    """
    # A run of kernels in the interpreter is no test of compiled ones. The child decides
    environ = {k: v for k, v in machine.environ.items() if k != "TRITON_INTERPRET"}
    paths = json.dumps([*map(str, sys.path), str(_PACKAGES)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", boot, paths],
            capture_output=True,
            timeout=seconds,
            env=environ,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        out, err, why = done.stdout, done.stderr, _ending(done.returncode)
    except subprocess.TimeoutExpired as error:
        out, err, why = error.stdout or b"", error.stderr or b"", f"took over {seconds:g} s"
    except OSError as error:
        out, err, why = b"", b"", f"could not be started: {error.strerror or error}"
    checks = list(_parsed(out.decode(errors="replace")))
    yield from checks
    # A child that says itself what fails ends with exit code 0
    if why != _ending(0) or not checks:
        made = {check.name for check in checks}
        missing = [name for name in NAMES if name not in made] or NAMES[-1:]
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        found = ": ".join([f"the process {why}", *(line[:300] for line in last)])
        fix = "python -c 'import torch, triton' shows whether they work at all"
        yield Check(missing[0], Status.PROBLEM, found, fix, {"missing": list(missing)})


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _parsed(text: str) -> Iterator[Check]:
    """Yield the checks in lines of JSON; what libraries print is passed over."""
    for line in text.splitlines():
        try:
            values = json.loads(line)
            yield Check(**{**values, "status": Status(values["status"])})
        except (ValueError, TypeError, KeyError):
            continue
