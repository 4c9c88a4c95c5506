"""The page of the command: its example is what the command says."""

import os
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from fake_machine import make_machine
from idefics2_engine.doctor import host_checks
from idefics2_engine.doctor.examination import examine
from paths import ROOT

PAGE = ROOT / "docs/doctor.md"
EXAMPLE = re.compile(r"(?<=<!-- example -->\n).*?(?=<!-- /example -->)", re.DOTALL)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the checks of a host with an H200 as a table."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**12, 0, 5 * 10**11))
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(host_checks, "loop_seconds", lambda: 0.19)
    monkeypatch.setattr(host_checks, "usable_cores", lambda: 16)
    monkeypatch.setattr(host_checks, "open_file_limit", lambda: (4096, 4096))
    fake = make_machine(tmp_path)
    # The programs are looked for first
    fake = replace(fake, environ={**fake.environ, "HOME": "/home/me"})
    which = str(shutil.which("nvidia-smi", path=fake.environ["PATH"]))
    monkeypatch.setattr(shutil, "which", lambda name, path: which if name == "nvidia-smi" else name)
    rows = ["| status | check | found | fix |", "|---|---|---|---|"]
    for check in examine(fake):
        found = "3.11.7" if check.name == "python" else check.found
        fix = f"`{check.fix}`" if check.fix else ""
        rows.append(f"| {check.status.value} | {check.name} | {found} | {fix} |")
    return "\n".join(rows) + "\n"


def test_example_is_what_the_command_says(table: str) -> None:
    found = EXAMPLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == table, f"the example in docs/doctor.md must be:\n{table}"


def test_every_check_has_a_row_that_says_what_triggers_it(table: str) -> None:
    triggers = PAGE.read_text(encoding="utf-8").split("## What triggers a line")[1]
    described = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| ([^|]+) \|", triggers, re.M)))
    names = [row.split(" | ")[1] for row in table.splitlines()[2:]]
    assert set(names) <= set(described)
