"""What all charts of results share: which rows they show, and how these look."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from idefics2_bench.results.results_file import ResultsFile, Row
from idefics2_engine.charts.drawing import Chart, Key, Mark

MINE = "mine"
"""The name of a user's implementation in rows of kernels."""

KERNELS = ("triton", MINE)
"""Implementations of kernels that charts show. Others are variants beside the chosen one."""

LOOKS = {
    "best peer": Mark(None, is_hollow=True),
    "ours": Mark(None),
    MINE: Mark(None, "diamond"),
}
"""The look of a row by its kind, but for the color."""


@dataclass(frozen=True)
class NamedChart:
    """A chart and the name of its SVG file, without a suffix."""

    name: str
    chart: Chart


def is_kernel(row: Row) -> bool:
    """Return whether a row is of a kernel, and not of the whole model or of image reading."""
    return "TFLOPs" in row or ("ms" not in row and "model" not in row)


def is_ours(file: ResultsFile, row: Row) -> bool:
    """Return whether charts show a row as ours."""
    return not file.is_peer(row) and (not is_kernel(row) or row["impl"] in KERNELS)


def kind_of(file: ResultsFile, row: Row) -> str:
    """Return the kind of a row, of those in ``LOOKS``."""
    return "best peer" if file.is_peer(row) else MINE if row["impl"] == MINE else "ours"


def time_text(ms: float) -> str:
    """Return a time with its unit."""
    return f"{ms * 1e3:.4g} us" if ms < 1 else f"{ms:.4g} ms"


def file_keys(shown: Iterable[str], colors: Mapping[str, int]) -> list[Key]:
    """Return the legend of files, unless there is only one."""
    keys = [Key((Mark(colors[name]),), name) for name in shown]
    return keys if len(keys) > 1 else []
