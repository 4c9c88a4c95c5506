"""The command ``idefics2 doctor``: its lines, its JSON and its exit codes."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_machine import H200, VERSIONS, make_machine, write_program
from hub_cache import write_snapshot
from idefics2_engine import __version__
from idefics2_engine.checkpoint.shards import SINGLE
from idefics2_engine.cli import command
from idefics2_engine.cli.main import main
from idefics2_engine.doctor import deep, examination, machine, report
from idefics2_engine.doctor.check import Check, Status, worst
from idefics2_engine.doctor.machine import Machine
from idefics2_engine.errors import ConfigError
from paths import EIGHT_B

NAMES = [
    "python",
    "torch",
    "triton",
    "torch and triton",
    "interpreter",
    "ptxas",
    "gpu",
    "driver",
    "kernels",
    "gpu memory",
    "host memory",
    "hub cache",
    "triton cache",
    "host speed",
    "cores",
    "/dev/shm",
    "open files",
    "optional packages",
]


def run_on(
    fake: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str
) -> tuple[int, str]:
    """Run the command on a machine and return the exit code and standard output."""
    monkeypatch.setattr(machine, "Machine", lambda: fake)
    code = main(["doctor", *args])
    return code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def _fast_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing depend on the real host's cores and speed."""
    from idefics2_engine.doctor import host_checks

    monkeypatch.setattr(host_checks, "loop_seconds", lambda: 0.25)
    monkeypatch.setattr(host_checks, "usable_cores", lambda: 16)
    monkeypatch.setattr(host_checks, "open_file_limit", lambda: (4096, 4096))


def test_each_check_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_on(make_machine(tmp_path), monkeypatch, capsys)
    *lines, last = out.splitlines()
    assert code == 0
    assert [line[9:28].strip() for line in lines] == NAMES
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    assert last.startswith("0 problems, ")
    assert last.endswith(f" in {len(NAMES)} checks")


def test_a_problem_is_exit_code_1_with_its_fix_on_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = make_machine(tmp_path, versions={**VERSIONS, "torch": "2.9.0"})
    code, out = run_on(fake, monkeypatch, capsys)
    assert code == 1
    (line,) = (line for line in out.splitlines() if line.startswith("problem"))
    assert line.endswith("2.11 is needed | fix: pip install 'torch>=2.11'")
    assert out.splitlines()[-1].startswith("1 problem, ")


def test_json_has_every_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_on(make_machine(tmp_path), monkeypatch, capsys, "--json")
    found: dict[str, Any] = json.loads(out)
    assert list(found) == ["version", "status", "deep", "checks"]
    assert (found["version"], found["deep"]) == (__version__, False)
    assert (code, found["status"]) in ((0, "ok"), (0, "warning"))
    assert [check["name"] for check in found["checks"]] == NAMES
    for check in found["checks"]:
        assert list(check) == ["name", "status", "found", "fix", "details"]
        assert check["status"] in ("ok", "warning", "problem")
        assert type(check["found"]) is str
        assert type(check["fix"]) is str
        assert type(check["details"]) is dict
        assert check["status"] == "ok" or check["fix"], "a finding that is not ok has a fix"
    details = {check["name"]: check["details"] for check in found["checks"]}
    assert details["gpu"]["gpus"][0]["name"] == "NVIDIA H200"
    assert details["host speed"] == {"loop_seconds": 0.25}


def test_json_of_a_problem_has_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = make_machine(tmp_path, versions={**VERSIONS, "torch": None})
    code, out = run_on(fake, monkeypatch, capsys, "--json")
    assert (code, json.loads(out)["status"]) == (1, "problem")


def test_machine_without_anything_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = make_machine(tmp_path, smi=None, versions={}, meminfo=None, ptxas=None)
    (tmp_path / "dev/shm").rmdir()
    code, out = run_on(fake, monkeypatch, capsys)
    assert code == 1
    assert len(out.splitlines()) == len(NAMES) + 1


def test_model_is_a_folder_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = make_machine(tmp_path)
    config = (EIGHT_B / "config.json").read_bytes()
    hub = tmp_path / "home/.cache/huggingface/hub"
    write_snapshot(hub, "org/own", {"config.json": config, SINGLE: b""})
    for model in (str(EIGHT_B), "org/own"):
        code, out = run_on(fake, monkeypatch, capsys, "--model", model)
        assert code == 0
        assert f"{model} takes 22.7 GB in bf16" in out


def test_model_that_is_neither_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = make_machine(tmp_path)
    monkeypatch.setattr(machine, "Machine", lambda: fake)
    assert main(["doctor", "--model", "org/none", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "config"
    assert "model must be a folder or a hub id that is in the cache, got 'org/none'" in captured.err
    (tmp_path / "empty").mkdir()
    for model in ("", str(tmp_path / "empty")):
        with pytest.raises(ConfigError):
            list(examination.examine(fake, model))


def test_deep_adds_the_checks_of_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = Check("kernel results", Status.PROBLEM, "wrong", "do not trust it")
    monkeypatch.setattr(examination, "deep_checks", lambda _machine: iter([child]))
    fake = make_machine(tmp_path)
    assert run_on(fake, monkeypatch, capsys)[0] == 0
    code, out = run_on(fake, monkeypatch, capsys, "--deep", "--json")
    found = json.loads(out)
    assert (code, found["deep"]) == (1, True)
    assert [check["name"] for check in found["checks"]] == [*NAMES, "kernel results"]


def test_network_is_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run_on(make_machine(tmp_path), monkeypatch, capsys)[0] == 0


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """The real machine is examined, in a process whose finder refuses what must not be imported."""
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'triton', 'transformers', 'huggingface_hub',"
        " 'pyarrow', 'ray', 'datasets', 'requests', 'httpx'):\n"
        "            sys.exit(f'{name} is imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from idefics2_engine.cli.main import main\n"
        "code = main(['doctor', '--json'])\n"
        "assert code in (0, 1), code\n"
    )
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin/nvidia-smi", H200)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**command_environ(), "PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    details = {check["name"]: check["details"] for check in found["checks"]}
    assert details["gpu"]["gpus"][0]["name"] == "NVIDIA H200"
    assert details["torch"]["version"]
    assert details["hub cache"]["folder"].startswith(str(tmp_path))


def command_environ() -> dict[str, str]:
    """Return the environment without what moves caches."""
    import os

    moved = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    return {name: value for name, value in os.environ.items() if name not in moved}


def test_lines_have_no_control_characters() -> None:
    check = Check("gpu", Status.OK, "a\nb\x1b[31m", "c\td")
    assert report.check_line(check) == "ok       gpu                a?b?[31m | fix: c?d"


def test_summary_counts() -> None:
    checks = [Check("a", status, "") for status in (*Status, Status.WARNING)]
    assert report.summary_line(checks) == "1 problem, 2 warnings in 4 checks"
    assert worst(checks) is Status.PROBLEM
    assert worst([]) is Status.OK


def test_help_names_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.build_parser().parse_args(["doctor", "--help"])
    assert "exit codes: 0 no problem, 1 a problem" in capsys.readouterr().out


def test_names_of_deep_checks_are_new() -> None:
    assert not set(deep.NAMES) & set(NAMES)
