"""The example of docs/parity.md is what the command prints, up to its numbers."""

import re

import pytest

from idefics2_engine.cli.main import main
from paths import ROOT


def without_numbers(line: str) -> str:
    line = re.sub(r"\d[\w.+-]*", "#", line)
    return re.sub(r" +", " ", line).strip()


@pytest.mark.long
def test_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```\n(A  ours.+?)^```$", page, re.DOTALL | re.MULTILINE)
    assert main(["parity", "--device", "cpu"]) == 0
    printed = [without_numbers(line) for line in capsys.readouterr().out.splitlines()]
    for line in map(without_numbers, example.splitlines()):
        # An ellipsis leaves out the rest of a line, or several lines
        begin, left_out, _ = line.partition("…")
        assert any(got.startswith(begin) if left_out else got == line for got in printed), line
