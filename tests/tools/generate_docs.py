"""Write everything on the pages that is made from code or results: ``make docs-generate``.

PYTHONPATH=engine:kernels:bench:tests/helpers:tests/tools python tests/tools/generate_docs.py
"""

from pathlib import Path

import error_tables
import option_tables
import structured_keywords
from idefics2_bench import report
from idefics2_bench.results import quoted_figures

ROOT = Path(__file__).resolve().parents[2]


def renewed_pages() -> dict[Path, str]:
    """Return the current text of every page with a generated part."""
    return {
        **report.renewed_pages(),
        **quoted_figures.renewed_pages(),
        structured_keywords.PAGE: structured_keywords.renewed_page(),
        error_tables.PAGE: error_tables.error_page(),
        ROOT / "docs/reference/command-line.md": option_tables.option_page(),
    }


def stale_pages() -> list[str]:
    """Return the pages whose generated parts are not current, by their paths in the checkout."""
    return [
        str(path.relative_to(ROOT))
        for path, text in renewed_pages().items()
        if path.read_text(encoding="utf-8") != text
    ]


if __name__ == "__main__":
    for path, text in renewed_pages().items():
        path.write_text(text, encoding="utf-8")
