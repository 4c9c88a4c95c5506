"""Pages of documentation: one width, and links that lead somewhere."""

import re
from pathlib import Path

import pytest

from paths import ROOT

PAGES = [ROOT / "DESIGN.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH = 100


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of ``page``."""
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_wrapped(page: Path) -> None:
    # A row of a table is one line, and so is a link
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > WIDTH and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `name`, twice\n[a](page.md) [b](#one-name-twice) [c](page.md#two) [d](no.md) [e](https://x.y)\n"
    )
    assert broken_links(page) == ["page.md#two", "no.md"]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/design").glob("*.md")), ids=lambda page: page.stem
)
def test_a_chapter_opens_plainly_and_ends_with_what_was_tried(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    opening = " ".join(text.split("\n\n")[1].split())
    assert len(re.findall(r"[.!?](?: |$)", opening)) == 5
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[-1] == "What was tried"
