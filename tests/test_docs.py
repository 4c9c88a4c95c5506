"""Tests of the pages of documentation: line width, links, and names of files."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from paths import ROOT

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "DESIGN", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
WIDTH = 100
# Names of files and folders on a page are relative to one of these
FOLDERS = [
    ROOT,
    ROOT / "engine/idefics2_engine",
    ROOT / "engine/idefics2_engine/jobs",
    ROOT / "kernels/idefics2_kernels",
    ROOT / "bench/idefics2_bench",
]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of ``page``."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def spelled_out(name: str) -> Iterator[str]:
    """Yield the names that the short form ``a/{b, c}.py`` covers."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    yield from ("".join(word.strip() for word in words) for words in product(*parts))


def name_exists(name: str) -> bool:
    """Return whether a module, a file or a folder of this name exists.

    A file name without a folder may be anywhere.
    """
    if name.startswith("idefics2_") and "/" not in name:
        return find_spec(name) is not None
    if "/" in name:
        return any((folder / name).exists() for folder in FOLDERS)
    places = ("engine", "kernels", "bench", "examples", "tests")
    return any(next((ROOT / place).rglob(name), None) for place in places)


def missing_modules(page: Path) -> list[str]:
    """Return names in backticks that look like files, folders or modules and do not exist."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    looks = re.compile(r"[\w./]+\.py|\w[\w./]*/|idefics2_(engine|kernels|bench)(\.\w+)*")
    names = [name for code in re.findall(r"`([^`\n]+)`", text) for name in spelled_out(code)]
    return [name for name in names if looks.fullmatch(name) and not name_exists(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_wrapped(page: Path) -> None:
    # A row of a table is one line, and so is a link
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > WIDTH and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_files_and_headings(page: Path) -> None:
    broken = broken_links(page)
    assert not broken, f"{page.name}: {broken} lead nowhere: correct the file's name or the heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_named_on_pages_exist(page: Path) -> None:
    missing = missing_modules(page)
    assert not missing, f"{page.name}: there is no {missing}: write the names that the files have"


def test_missing_modules_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`llm.py` `lmm.py` `model/{config, confit}.py` `scheduling/` `schedule/` `llm.stats`\n"
        "`idefics2_kernels.nf4` `idefics2_kernels.nf5` `tests/helpers/paths.py` `/images/`\n"
        "```\n`in_code.py`\n```\n"
    )
    assert missing_modules(page) == [
        "lmm.py",
        "model/confit.py",
        "schedule/",
        "idefics2_kernels.nf5",
    ]


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `name`, twice\n[a](page.md) [b](#one-name-twice) [c](page.md#two) [d](no.md) [e](https://x.y)\n"
    )
    assert broken_links(page) == ["page.md#two", "no.md"]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/design").glob("*.md")), ids=lambda page: page.stem
)
def test_chapter_opens_with_five_sentences_and_ends_with_what_was_tried(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    opening = " ".join(text.split("\n\n")[1].split())
    assert len(re.findall(r"[.!?](?: |$)", opening)) == 5
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[-1] == "What was tried"
