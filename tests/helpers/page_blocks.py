"""The fenced blocks of a page, with the marks in front of them.

A mark is a comment on the line above a fence, so that a git host and the site show none of it:
``<!-- no-run: REASON -->``, ``<!-- long -->``, ``<!-- exit: CODE -->``, and ``<!-- output -->`` for
what the Python block above prints. ``<!-- file: NAME -->`` makes a block a file that the others
need, and a comment that goes on over several lines holds such a file unseen.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from paths import ROOT

_MARK = re.compile(r"<!-- (no-run|long|exit|output|file)(?:: (.+?))? -->")
_FILE = re.compile(r"^<!-- file: (\S+)\n(.*?)^-->$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line, its language, text and marks."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where the block is, as ``PAGE:LINE``."""
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the tests run this block."""
        code = self.language in ("console", "python")
        return (code or "output" in self.marks) and not {"no-run", "file"} & self.marks.keys()


def pages() -> list[Path]:
    """Return README and the pages of ``docs/`` that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return list(_read(page))


def files_of(page: Path) -> dict[str, str]:
    """Return the contents of the files that a page's blocks and comments hold."""
    files = dict(_FILE.findall(page.read_text(encoding="utf-8")))
    return files | {one.marks["file"]: one.text for one in _read(page) if "file" in one.marks}


def text_outside(page: str) -> str:
    """Return the text of a page with its fenced blocks left empty."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def _read(page: Path) -> Iterator[Block]:
    marks: dict[str, str] = {}
    inside: list[str] | None = None
    begin, language = 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            if line == "```":
                yield Block(page, begin, language, "".join(inside), marks)
                inside, marks = None, {}
            else:
                inside.append(f"{line}\n")
        elif line.startswith("```"):
            inside, begin, language = [], number, line.removeprefix("```")
        elif found := _MARK.fullmatch(line):
            marks[found[1]] = found[2] or ""
        else:
            marks = {}
