"""What the pages have from code and results is current."""

from pathlib import Path

import pytest

import generate_docs
from idefics2_bench import report
from paths import ROOT

ADVICE = "run `make docs-generate` and commit what it writes"


def test_generated_parts_are_current() -> None:
    stale = generate_docs.stale_pages()
    assert not stale, f"{', '.join(stale)}: not what the code and the results say; {ADVICE}"


def test_page_that_is_not_current_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/errors.md"
    pages = {page: page.read_text(encoding="utf-8").replace("`too_many_images`", "`many`")}
    monkeypatch.setattr(generate_docs, "renewed_pages", lambda: pages)
    assert generate_docs.stale_pages() == ["docs/errors.md"]


def test_every_page_of_kernels_is_generated() -> None:
    assert set(report.renewed_pages()) == set((ROOT / "docs/kernels").glob("*.md"))


def test_every_marker_is_filled_by_a_generator() -> None:
    # Those of doctor.md are written out by its own test
    by_hand = {ROOT / "docs/doctor.md"}
    pages: set[Path] = {
        path
        for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        if "\n<!-- /" in path.read_text(encoding="utf-8")
    }
    assert pages - by_hand <= set(generate_docs.renewed_pages())
