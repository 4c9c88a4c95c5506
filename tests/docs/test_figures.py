"""Every figure on the pages comes from a results file, or has a reason to be written by hand."""

import tomllib
from pathlib import Path

import pytest

from page_blocks import pages
from page_figures import figures_in, figures_of, recorded
from paths import ROOT, TESTS

FILE = "tests/data/figures.toml"
LISTED = tomllib.loads((TESTS / "data/figures.toml").read_text(encoding="utf-8"))


def listed(page: str) -> set[str]:
    """Return the figures of a page that the file lists."""
    groups = LISTED["by_hand"].get(page, [])
    return {*LISTED["recorded"].get(page, {}), *(one for g in groups for one in g["figures"])}


def problems(page: str, found: set[str]) -> list[str]:
    """Return what is wrong with the figures of a page."""
    said = [
        f"{page}: {figure!r} has no source: make it part of a table of `make docs-generate`, or add "
        f"it to {FILE}, with a row of a results file or with a reason"
        for figure in sorted(found - listed(page))
    ]
    said += [
        f"{page}: {figure!r} is not on the page any more: take it out of {FILE}"
        for figure in sorted(listed(page) - found)
    ]
    for figure, source in LISTED["recorded"].get(page, {}).items():
        if (now := recorded(figure, source)) != figure:
            said.append(f"{page}: {source} is {now}, not {figure}: correct the page and {FILE}")
    return said


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_have_a_source(page: Path) -> None:
    wrong = problems(str(page.relative_to(ROOT)), figures_of(page))
    assert not wrong, "\n".join(wrong)


def test_list_has_no_other_pages_and_a_reason_for_each_figure() -> None:
    names = {str(page.relative_to(ROOT)) for page in pages()}
    assert LISTED["by_hand"].keys() | LISTED["recorded"].keys() <= names
    groups = [group for found in LISTED["by_hand"].values() for group in found]
    assert all(group["figures"] and len(group["reason"].split()) > 2 for group in groups)


def test_wrong_figure_is_found() -> None:
    page = ROOT / "docs/quantization.md"
    text = page.read_text(encoding="utf-8").replace("takes 2.46 ms", "takes 2.45 ms")
    first, second = problems("docs/quantization.md", set(figures_in(text)))
    assert "'2.45 ms' has no source: make it part of a table" in first
    assert "'2.46 ms' is not on the page any more" in second


def test_figure_that_differs_from_its_results_file_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "h200-latency decode-b1-nf4 triton ms"
    monkeypatch.setitem(LISTED, "recorded", {"page": {"2.45 ms": source}})
    assert problems("page", {"2.45 ms"}) == [
        f"page: {source} is 2.46 ms, not 2.45 ms: correct the page and {FILE}"
    ]


def test_row_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KeyError, match=r"h200-latency\.json has no row of decode-b3 by triton"):
        recorded("2.46 ms", "h200-latency decode-b3 triton ms")


def test_figures_are_read() -> None:
    text = """\
It took 4.35, 4.85 and 5.34 ms, 1,024 rows/s, 9 x 98 and 2 us, 1.4 x, `decode-b1 3 ms`, 5 %.
<!-- figures: one -->
| 7 ms |
<!-- /figures -->
```console
8 ms
```
"""
    assert list(figures_in(text)) == [
        "4.35 ms", "4.85 ms", "5.34 ms", "1,024 rows/s", "2 us", "1.4 x", "3 ms", "5 %",
    ]  # fmt: skip
