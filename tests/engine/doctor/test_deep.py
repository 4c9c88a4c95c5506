"""The child process that imports torch: what it reports, and how it may end."""

import json
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from fake_machine import make_machine
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.deep import NAMES, deep_checks
from idefics2_engine.doctor.deep_child import child_checks
from idefics2_engine.doctor.machine import Machine
from idefics2_kernels.catalog import criterion

HAS_GPU = torch.cuda.is_available()


def line(name: str, status: str = "ok") -> str:
    return json.dumps({"name": name, "status": status, "found": "f", "fix": "", "details": {}})


def ended(tmp_path: Path, program: str, seconds: float = 60.0) -> list[Check]:
    """Return the checks of a child that runs ``program``."""
    return list(deep_checks(make_machine(tmp_path), seconds, program))


def printing(*lines: str) -> str:
    return f"print({chr(10).join(lines)!r}, flush=True)\n"


def test_real_child_runs_kernels() -> None:
    checks = {check.name: check for check in deep_checks(Machine())}
    assert list(checks) == list(NAMES)
    assert {check.status for check in checks.values()} == {Status.OK}
    shares = checks["kernel results"].details["share_of_allowed_error"]
    assert set(shares) == {"rms_norm", "flash_attention", "nf4_matmul"}
    assert all(0 <= share <= 1 for share in shares.values())


def test_checks_of_a_child_are_passed_on(tmp_path: Path) -> None:
    program = printing(*(line(name) for name in NAMES), "a library's line", '{"name": 1}', "3")
    checks = ended(tmp_path, program)
    assert [check.name for check in checks] == list(NAMES)


def test_child_that_says_what_fails_adds_no_other_problem(tmp_path: Path) -> None:
    checks = ended(tmp_path, printing(line("torch import", "problem")))
    assert [(check.name, check.status) for check in checks] == [("torch import", Status.PROBLEM)]


@pytest.mark.parametrize(
    ("end", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("raise SystemExit('out of luck')", "ended with exit code 1: out of luck"),
        ("import os; os._exit(0)", "ended with exit code 0"),
    ],
)
def test_child_that_ends_early_is_a_problem(tmp_path: Path, end: str, found: str) -> None:
    is_silent = "_exit" in end
    program = ("" if is_silent else printing(line(NAMES[0]), line(NAMES[1]))) + end
    checks = ended(tmp_path, program)
    last = checks[-1]
    assert last.name == (NAMES[0] if is_silent else NAMES[2])
    assert (last.status, last.found) == (Status.PROBLEM, f"the process {found}")
    assert last.details["missing"] == list(NAMES if is_silent else NAMES[2:])


def test_child_that_hangs_is_ended(tmp_path: Path) -> None:
    # It may be ended before or after its first line
    program = printing(line(NAMES[0])) + "import time\ntime.sleep(1000)"
    checks = ended(tmp_path, program, 1.0)
    assert checks[-1].status is Status.PROBLEM
    assert checks[-1].found == "the process took over 1 s"


def test_child_does_not_get_the_interpreter_by_accident(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, environ={"TRITON_INTERPRET": "1", "OTHER": "2"})
    found = {"name": "x", "status": "ok", "found": "", "fix": "", "details": {}}
    program = (
        "import json, os\n"
        f"found = {found!r}\n"
        "found['found'] = ' '.join(sorted({'TRITON_INTERPRET', 'OTHER'} & os.environ.keys()))\n"
        "print(json.dumps(found))"
    )
    assert next(iter(deep_checks(machine, 60.0, program))).found == "OTHER"


# The child's own answers to a machine on which something fails, in this process


def test_torch_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (check,) = child_checks()
    assert (check.name, check.status) == ("torch import", Status.PROBLEM)
    assert "fails: ModuleNotFoundError" in check.found
    assert check.fix


def test_kernels_that_cannot_be_imported_are_a_problem_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "idefics2_engine.doctor.kernel_routes", None)
    *_, check = child_checks()
    assert check.name == "kernels here"
    assert check.status is (Status.PROBLEM if HAS_GPU else Status.WARNING)


def test_kernels_that_cannot_run_are_a_problem_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> float:
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nmore")

    monkeypatch.setattr(criterion, "case_error", fail)
    *_, check = child_checks()
    assert check.found == "fails: RuntimeError: PTX was compiled with an unsupported toolchain"
    assert check.status is (Status.PROBLEM if HAS_GPU else Status.WARNING)


@pytest.mark.parametrize(("share", "status"), [(1.0, "ok"), (1.01, "problem"), (inf, "problem")])
def test_wrong_results_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, share: float, status: str
) -> None:
    monkeypatch.setattr(criterion, "case_error", lambda *_arguments: share)
    *_, check = child_checks()
    assert (check.name, check.status) == ("kernel results", status)
    assert ("do not trust" in check.fix) == (status == "problem")
    assert "Infinity" not in json.dumps(check.to_dict())
