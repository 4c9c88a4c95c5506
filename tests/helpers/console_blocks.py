"""Runs the commands of ``console`` blocks, and compares what they print with the page.

A line that begins with ``$ `` is a command, and what follows it is its output. ``…`` stands for any
text of a line, and a line with nothing else for any number of lines. A command with no output below
it only has to end with the exit code 0, or that of the mark ``exit``.
"""

import glob
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

import pytest

from idefics2_engine.cli.main import main
from page_blocks import Block

ADVICE = "Correct the block; … stands for what may vary."
# An assignment in front of a command, as in `NAME=value idefics2 …`
_ASSIGNMENT = re.compile(r"\w+=.*")


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a block with the lines that follow it."""
    joined = block.text.replace("\\\n", "")
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, shown


def check_block(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block in the current folder.

    Raises:
        AssertionError: A command ends or prints otherwise than the page says.
    """
    assert block.text.startswith("$ "), f"{block.place}: a console block must begin with a command"
    wanted = int(block.marks.get("exit", 0))
    for command, shown in commands(block):
        exit_code, printed = run_command(command, monkeypatch)
        told = f"{block.place}: `{command}`"
        assert exit_code == wanted, (
            f"{told} ends with {exit_code}, not {wanted}: mend the command, or mark the block with "
            f"<!-- exit: {exit_code} -->\n{printed}"
        )
        if shown:
            assert is_shown(printed, shown), f"{told} prints\n{printed}\n{ADVICE}"


def is_shown(printed: str, shown: list[str]) -> bool:
    """Return whether the lines of a page are what was printed."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else ".*?".join(map(re.escape, line.split("…"))) + r" *\n"
        for line in shown
    )
    return re.fullmatch(pattern, f"{printed.rstrip()}\n") is not None


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Return the exit code of a command and what it printed on both streams.

    ``idefics2`` runs in this process, alone or at the end of a pipe. Everything else runs in bash.
    """
    before, _, last = command.rpartition(" | ")
    words = shlex.split(last, comments=True)
    with monkeypatch.context() as patch:
        while _ASSIGNMENT.fullmatch(words[0]):
            patch.setenv(*words.pop(0).split("=", 1))
        if os.path.basename(words[0]) != "idefics2":
            return _run_in_bash(command)
        given = subprocess.run(["bash", "-c", before], capture_output=True, check=True).stdout
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        arguments = [name for word in words[1:] for name in sorted(glob.glob(word)) or [word]]
        printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                exit_code = main(arguments)
            except SystemExit as ending:
                exit_code = ending.code if isinstance(ending.code, int) else 1
        printed.seek(0)
        return exit_code, printed.read()


def _run_in_bash(command: str) -> tuple[int, str]:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout
