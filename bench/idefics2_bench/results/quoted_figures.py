"""The tables of README and ``docs/benchmarks.md`` that quote results files.

A table is between ``<!-- figures: NAME -->`` and ``<!-- /figures -->``. ``make docs-generate``
writes it.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[3]
PAGES = (_ROOT / "README.md", _ROOT / "docs/benchmarks.md")
_TABLE = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- /figures -->)", re.DOTALL)
_PEERS = {
    "transformers": "transformers",
    "transformers-compiled": "transformers compiled ¹",
    "transformers-compiled-sorted": "transformers compiled ¹, sorted by length",
}
_EARLIER = "h200-latency-d1d3656"
_HEADLINE = (
    ("decode step, 1 sequence", "h200-latency-compiled", "decode-b1"),
    ("decode step, 32 sequences", "h200-latency-compiled", "decode-b32"),
    ("decode step, 128 sequences", "h200-latency-compiled", "decode-b128"),
    ("8 images of 980 x 980", "h200-latency", "image-980-b8"),
    ("16 images of mixed sizes", "h200-latency", "image-mixed-b16"),
    ("prompt of 4,096 tokens", _EARLIER, "prefill-4096"),
    ("1,024 requests, JPEG files to text", "h200-offline-compiled", "offline-1024"),
)
# Label, case, and the H200's file with the sign of its footnote
_STEPS = (
    ("decode step of 1 sequence, 200 tokens of context", "decode-b1", "h200-latency", ""),
    ("decode step of 32", "decode-b32", "h200-latency", ""),
    ("decode step of 128", "decode-b128", "h200-latency", ""),
    ("8 images of 980 x 980", "image-980-b8", "h200-latency", ""),
    ("16 images of 378 x 504", "image-378x504-b16", "h200-latency", ""),
    ("16 images of mixed sizes", "image-mixed-b16", "h200-latency", ""),
    ("prompt of 4,096 tokens", "prefill-4096", _EARLIER, " ¹"),
    ("prompt of 16,384 tokens", "prefill-16384", _EARLIER, " ¹"),
    ("in NF4: decode step of 1 sequence", "decode-b1-nf4", "h200-latency", ""),
    ("in NF4: decode step of 16", "decode-b16-nf4", _EARLIER, " ¹"),
    ("in NF4: prompt of 4,096 tokens", "prefill-4096-nf4", _EARLIER, " ¹"),
)


def results(name: str) -> dict[str, Any]:
    """Return the contents of ``bench/results/NAME.json``."""
    return _read(_ROOT / f"bench/results/{name}.json")


def row(name: str, case: str, impl: str = "triton") -> Row:
    """Return the row of a case and an implementation in a results file.

    Raises:
        KeyError: There is no such row.
    """
    for one in results(name)["rows"]:
        if (one["case"], one["impl"]) == (case, impl):
            found: Row = one
            return found
    raise KeyError(f"bench/results/{name}.json has no row of {case} by {impl}")


def figure(value: float) -> str:
    """Return a number with three digits, and whole if it has more."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float) -> str:
    """Return a ratio with two digits."""
    return f"{value:.0f} x" if value >= 9.95 else f"{value:.1f} x"


def renewed_pages() -> dict[Path, str]:
    """Return the pages with their current tables.

    Raises:
        KeyError: A page names a table that does not exist, or a table quotes a row that does not.
    """
    return {path: with_tables(path.read_text(encoding="utf-8")) for path in PAGES}


def with_tables(page: str) -> str:
    """Return the text of a page with its current tables."""
    return _TABLE.sub(lambda found: f"{found[1]}{_tables(found[2])}{found[3]}", page)


def _tables(name: str) -> str:
    if name not in _TABLES:
        raise KeyError(f"no table of figures is named {name!r}: use one of {', '.join(_TABLES)}")
    return "\n".join(_TABLES[name]()) + "\n"


def _headline() -> list[str]:
    lines = [
        "| one H200 or H100, 8B shape, bf16 | ours | best alternative | ratio | GPU, date |",
        "|---|---:|---:|---:|---|",
    ]
    for label, name, case in _HEADLINE:
        one = row(name, case)
        peer = f"{_time(one['peer_ms'])}, {_PEERS[one['peer']]}"
        machine = results(name)["machine"]
        place = f"{machine['gpu'].removeprefix('NVIDIA ')}, {machine['date']}"
        lines.append(
            f"| {label} | {_time(one['ms'])} | {peer} | {ratio(one['speedup'])} | {place} |"
        )
    return lines


def _compiled() -> list[str]:
    lines = [
        "| decode step | ours, ms | transformers compiled | transformers | over the faster |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, case in (("1 sequence", 1), ("32 sequences", 32), ("128 sequences", 128)):
        ours, compiled, eager = (
            row("h200-latency-compiled", f"decode-b{case}", impl)
            for impl in ("triton", "transformers-compiled", "transformers")
        )
        times = " | ".join(figure(one["ms"]) for one in (ours, compiled, eager))
        lines.append(f"| {label} | {times} | {ratio(ours['speedup'])} |")
    return lines


def _steps() -> list[str]:
    lines = [
        "| | H200, ms | transformers | | H100, ms | transformers | |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, case, name, sign in _STEPS:
        cells = [_cells(row(name, case), sign), _cells(row("h100-latency", case), "")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    load = row("h100-load", "load")
    weights = row("h200-latency", "decode-b1")["weights_GB"]
    label = f"loading {weights:.1f} GB of weights from the page cache"
    lines.append(f"| {label} | | | | {_cells(load, ' ²')} |")
    return lines


def _cells(one: Row, sign: str) -> str:
    peer = f"{figure(one['peer_ms'])} | {ratio(one['speedup'])}" if "peer" in one else "|"
    return f"{figure(one['ms'])}{sign} | {peer}"


def _time(ms: float) -> str:
    return f"{figure(ms / 1e3)} s" if ms >= 1e3 else f"{figure(ms)} ms"


@cache
def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


_TABLES: dict[str, Callable[[], list[str]]] = {
    "headline": _headline,
    "compiled": _compiled,
    "steps": _steps,
}
