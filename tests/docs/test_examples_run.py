"""Commands and Python code on the pages run, and print what the pages say."""

import io
import re
import signal
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import pytest
import torch

from console_blocks import ADVICE, check_block, is_shown
from idefics2_engine import LLM
from page_blocks import Block, blocks_of, files_of, pages
from page_folder import make_folder, page_names
from paths import ROOT

BLOCKS = [block for page in pages() for block in blocks_of(page)]
# This number may only fall
MOST_NOT_RUN = 34


def run_blocks(blocks: list[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run blocks of one page in a new folder, and Python blocks with the names of those before."""
    make_folder(folder, blocks[0].page)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    names = page_names()
    with ExitStack() as stack:
        # An example sets a handler of its own
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        for block in blocks:
            if block.language == "console":
                check_block(block, monkeypatch)
            elif block.language == "python":
                if "llm" in block.text:
                    names["llm"] = stack.enter_context(LLM())
                code = compile("\n" * block.line + block.text, str(block.page), "exec")
                printed = io.StringIO()
                with redirect_stdout(printed):
                    exec(code, names)
            else:
                told = f"{block.place}: the code above prints\n{printed.getvalue()}\n{ADVICE}"
                assert is_shown(printed.getvalue(), block.text.splitlines()), told


def ids_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


QUICK = [block for block in BLOCKS if block.runs and "long" not in block.marks]
SLOW = [block for block in BLOCKS if block.runs and "long" in block.marks]


# With a GPU, answers are computed in bfloat16, and several models do not fit beside each other
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the pages show answers of a CPU")


@on_a_cpu
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in QUICK), ids=ids_of)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_blocks([block for block in QUICK if block.page == page], tmp_path, monkeypatch)


@on_a_cpu
@pytest.mark.long
@pytest.mark.parametrize("block", SLOW, ids=lambda block: block.place)
def test_long_examples_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_blocks([block], tmp_path, monkeypatch)


def test_commands_are_in_console_blocks() -> None:
    shells = [block.place for block in BLOCKS if block.language in ("sh", "bash", "shell")]
    assert not shells, (
        f"{', '.join(shells)}: commands must be in a block marked `console`, with `$ ` before each, "
        "so that the tests run them"
    )


def test_blocks_that_are_not_run_have_a_reason_and_become_fewer() -> None:
    not_run = [block for block in BLOCKS if "no-run" in block.marks]
    assert all(block.language in ("console", "python") for block in not_run)
    bare = [block.place for block in not_run if not block.marks["no-run"]]
    assert not bare, f"{', '.join(bare)}: write the reason, as in <!-- no-run: needs a GPU -->"
    assert len(not_run) == MOST_NOT_RUN, (
        f"{len(not_run)} blocks are not run, and {MOST_NOT_RUN} were: let new ones run, or lower "
        "MOST_NOT_RUN"
    )


PAGE = """\
<!-- file: rows.jsonl
one
-->

<!-- exit: 3 -->
```console
$ cat rows.jsonl; \\
    exit 3
one
```

<!-- no-run: needs a GPU -->
```python
a
```
"""


def test_page_is_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first, second = blocks_of(page)
    assert files_of(page) == {"rows.jsonl": "one\n"}
    assert (first.language, first.line, first.marks) == ("console", 6, {"exit": "3"})
    assert first.runs
    assert not second.runs
    assert second.marks == {"no-run": "needs a GPU"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("one\n```", "two\n```", f"`cat rows.jsonl; .*` prints\none\n\n{ADVICE}"),
        ("exit: 3", "exit: 4", "ends with 3, not 4: mend the command, or mark the block"),
        ("$ cat", "cat", "a console block must begin with a command"),
    ],
)
def test_stale_block_is_refused(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("one\n")
    page.write_text(PAGE)
    check_block(blocks_of(page)[0], monkeypatch)
    page.write_text(PAGE.replace(old, new))
    with pytest.raises(AssertionError, match=message):
        check_block(blocks_of(page)[0], monkeypatch)


@pytest.mark.parametrize(
    ("shown", "fits"),
    [
        (["one 1", "two 2"], True),
        (["one …", "two 2"], True),
        (["…", "two 2"], True),
        (["one 1", "two 2", "…"], True),
        (["one 1"], False),
        (["… 2", "two 2"], False),
        (["one 1", "…", "two 2", "two 2"], False),
    ],
)
def test_ellipsis_stands_for_what_may_vary(shown: list[str], fits: bool) -> None:
    assert is_shown("one 1\ntwo 2\n", shown) is fits


def test_renamed_option_in_a_block_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ idefics2 generate --picture a.png --prompt Hi\n```\n")
    with pytest.raises(AssertionError, match=re.compile("ends with 2.*--picture", re.DOTALL)):
        check_block(blocks_of(page)[0], monkeypatch)
