"""Checks of versions: each finding and what triggers it, on machines that the tests make."""

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fake_machine import VERSIONS, make_machine, with_environ, write_program
from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.packages import (
    Package,
    find_package,
    is_for_amd,
    is_older,
    release,
    torch_cuda,
)
from idefics2_engine.doctor.version_checks import python_check, version_checks
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def checks_of(folder: Path, *, has_gpu: bool = True, **options: Any) -> dict[str, Check]:
    machine = make_machine(folder, **options)
    return {check.name: check for check in version_checks(machine, has_gpu=has_gpu)}


def test_fitting_versions_are_ok(tmp_path: Path) -> None:
    checks = checks_of(tmp_path)
    assert {check.status for check in checks.values()} == {Status.OK}
    assert not any(check.fix for check in checks.values())
    assert checks["torch"].found == "2.13.0, built for CUDA 13.0"
    assert checks["ptxas"].details["version"] == "12.8"


@pytest.mark.parametrize(
    ("name", "has_gpu", "options", "status", "found", "fix"),
    [
        ("torch", True, {"torch": None}, "problem", "not installed", "pip install 'torch>=2.11'"),
        ("torch", True, {"torch": "2.10.1"}, "problem", "2.11 is needed", "pip install"),
        ("triton", True, {"triton": "3.5.1"}, "problem", "3.6 is needed", "pip install 'triton"),
        ("triton", True, {"triton": None}, "problem", "only the plain PyTorch path", "triton"),
        ("triton", False, {"triton": None}, "warning", "only the plain PyTorch path", "triton"),
        ("interpreter", True, {"numpy": None}, "problem", "not installed", "'numpy>=2.0'"),
        ("interpreter", True, {"numpy": "1.26.4"}, "problem", "2.0 is needed", "'numpy>=2.0'"),
        (
            "interpreter",
            True,
            {"triton": "3.6.0", "numpy": "2.4.0"},
            "warning",
            "Triton 3.6.0 cannot interpret under numpy 2.4.0",
            "pip install 'numpy<2.4'",
        ),
        ("interpreter", True, {"triton": "3.6.0", "numpy": "2.3.9"}, "ok", "2.3.9 fits", ""),
        ("torch and triton", True, {"triton": "3.6.0"}, "warning", "requires Triton 3.7.1", "=="),
        ("torch and triton", True, {"triton": "3.7.9"}, "ok", "torch requires Triton 3.7.1", ""),
        ("ptxas", True, {"triton": None}, "ok", "Triton is missing", ""),
    ],
)
def test_versions_that_do_not_fit(
    tmp_path: Path,
    name: str,
    has_gpu: bool,
    options: dict[str, str | None],
    status: str,
    found: str,
    fix: str,
) -> None:
    check = checks_of(tmp_path, has_gpu=has_gpu, versions={**VERSIONS, **options})[name]
    assert check.status == status
    assert found in check.found
    assert fix in check.fix
    assert bool(fix) == bool(check.fix)


def test_a_cpu_build_beside_a_gpu_is_a_problem(tmp_path: Path) -> None:
    check = checks_of(tmp_path / "a", cuda=None)["torch"]
    assert check.status is Status.PROBLEM
    assert "the GPU is not used" in check.found
    assert checks_of(tmp_path / "b", cuda=None, has_gpu=False)["torch"].status is Status.OK


def test_a_build_for_amd_is_a_problem(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    version = tmp_path / "site/torch/version.py"
    version.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n")
    check = next(c for c in version_checks(machine, has_gpu=True) if c.name == "torch")
    assert (check.status, "ROCm" in check.found) == (Status.PROBLEM, True)


def test_torch_without_a_pin_fits_every_triton(tmp_path: Path) -> None:
    check = checks_of(tmp_path, pin=None)["torch and triton"]
    assert check.status is Status.OK
    assert check.details["pin"] is None


@pytest.mark.parametrize(
    ("value", "has_gpu", "numpy", "status"),
    [
        ("1", True, "2.4.6", "problem"),
        ("1", False, "2.4.6", "warning"),
        ("true", False, "2.4.6", "problem"),
        ("0", True, "2.4.6", "ok"),
        ("", True, "2.4.6", "ok"),
    ],
)
def test_interpreter_that_is_on(
    tmp_path: Path, value: str, has_gpu: bool, numpy: str, status: str
) -> None:
    versions = {**VERSIONS, "numpy": numpy}
    machine = with_environ(make_machine(tmp_path, versions=versions), TRITON_INTERPRET=value)
    checks = {check.name: check for check in version_checks(machine, has_gpu=has_gpu)}
    assert checks["interpreter"].status == status
    assert (checks["interpreter"].fix == "unset TRITON_INTERPRET") == (status != "ok")


def test_interpreter_that_is_on_and_fails_is_a_problem(tmp_path: Path) -> None:
    versions = {**VERSIONS, "triton": "3.6.0"}
    machine = with_environ(make_machine(tmp_path, versions=versions), TRITON_INTERPRET="1")
    checks = {check.name: check for check in version_checks(machine, has_gpu=False)}
    assert checks["interpreter"].status is Status.PROBLEM
    assert "numpy<2.4" in checks["interpreter"].fix


def test_ptxas_that_is_missing_or_broken(tmp_path: Path) -> None:
    check = checks_of(tmp_path / "a", ptxas=None)["ptxas"]
    assert (check.status, check.found) == (Status.PROBLEM, "missing from Triton")
    assert "triton==3.7.1" in check.fix
    assert checks_of(tmp_path / "b", ptxas=None, has_gpu=False)["ptxas"].status is Status.WARNING
    machine = make_machine(tmp_path / "c")
    write_program(tmp_path / "c/site/triton/backends/nvidia/bin/ptxas", "no such file", code=127)
    check = {c.name: c for c in version_checks(machine, has_gpu=True)}["ptxas"]
    assert check.status is Status.PROBLEM
    assert "failed with exit code 127: no such file" in check.found


def test_ptxas_of_the_environment(tmp_path: Path) -> None:
    machine = with_environ(make_machine(tmp_path), TRITON_PTXAS_PATH="/no/such/ptxas")
    check = {c.name: c for c in version_checks(machine, has_gpu=True)}["ptxas"]
    assert (check.status, check.fix) == (Status.WARNING, "unset TRITON_PTXAS_PATH")


def test_old_python_is_a_problem() -> None:
    assert python_check((3, 10, 4)).status is Status.PROBLEM
    assert python_check((3, 11, 0)).status is Status.OK


def test_a_nightly_triton_has_another_name(tmp_path: Path) -> None:
    versions = {**VERSIONS, "triton": None, "pytorch-triton": "3.7.1+git12"}
    assert checks_of(tmp_path, versions=versions)["triton"].found == "3.7.1+git12"


def test_versions_are_compared_by_their_numbers() -> None:
    assert release("2.11.0a0+git123") == (2, 11, 0)
    assert release("unknown") == ()
    assert is_older("2.9.1", "2.11")
    assert not is_older("2.11", "2.11")
    assert not is_older("3", "2.11")
    assert is_older("525.60.2", "525.60.13")


def test_cuda_of_torch_is_in_its_version_without_its_file(tmp_path: Path) -> None:
    assert torch_cuda(Package("torch", "2.11.0+cu130", tmp_path)) == "13.0"
    assert torch_cuda(Package("torch", "2.11.0+cpu", tmp_path)) is None
    assert is_for_amd(Package("torch", "2.11.0+rocm6.4", tmp_path))


def test_installed_torch_is_described_as_it_describes_itself() -> None:
    import torch

    package = find_package("torch")
    assert package is not None
    assert package.version == metadata.version("torch")
    assert torch_cuda(package) == torch.version.cuda
    assert is_for_amd(package) == (torch.version.hip is not None)


def test_packages_without_metadata_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_package("no-such-package-of-this-name") is None

    class Broken:
        version = None

    monkeypatch.setattr(metadata, "distribution", lambda _name: Broken())
    assert find_package("torch") is None


def test_facts_are_those_of_the_project() -> None:
    least = {
        Requirement(one).name: str(Requirement(one).specifier) for one in PROJECT["dependencies"]
    }
    assert {name: least[name] for name in facts.LEAST} == {
        name: f">={version}" for name, version in facts.LEAST.items()
    }
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, facts.LEAST_PYTHON))}"
    for extra, packages in facts.EXTRAS.items():
        wanted = [Requirement(one) for one in PROJECT["optional-dependencies"][extra]]
        assert {one.name: str(one.specifier) for one in wanted} == {
            name: f">={version}" for name, version in packages.items()
        }
