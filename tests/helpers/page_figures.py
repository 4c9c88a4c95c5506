"""Figures with a unit in the text of pages, outside generated tables and blocks of code."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from page_blocks import text_outside
from paths import ROOT

_NUMBER = r"\d[\d,]*\d(?:\.\d+)?|\d(?:\.\d+)?"
_UNIT = r"ms|us|x(?! \d)|GB|%|tokens/s|rows/s|requests/s|TFLOP/s|GB/s|TB/s"
# Several numbers may share a unit, as in "4.35, 4.85 and 5.34 ms"
_FIGURES = re.compile(
    rf"(?<![\w.,-])(?<!x )((?:{_NUMBER})(?:(?:, | and | or | to )(?:{_NUMBER}))*) ({_UNIT})(?![\w/])"
)
_GENERATED = re.compile(r"<!-- ([\w-]+)(?:: [\w-]+)? -->\n.*?<!-- /\1 -->", re.DOTALL)
# What times a value is a figure, by the unit and the end of the key
_SCALES = {("us", "ms"): 1e3, ("%", "share"): 100.0, ("%", "speedup"): 100.0}


def figures_of(page: Path) -> set[str]:
    """Return the figures of a page, each with its unit."""
    return set(figures_in(page.read_text(encoding="utf-8")))


def figures_in(page: str) -> Iterator[str]:
    """Yield the figures of the text of a page that no generator and no command made."""
    text = " ".join(text_outside(_GENERATED.sub("", page)).split())
    for numbers, unit in _FIGURES.findall(text):
        for number in re.findall(_NUMBER, numbers):
            yield f"{number} {unit}"


def recorded(figure: str, source: str) -> str:
    """Return what a results file says for a figure, in the figure's digits and unit.

    Args:
        figure: A number and its unit.
        source: ``FILE CASE IMPLEMENTATION KEY``. A key may be a path with dots.

    Raises:
        KeyError: There is no such row or key.
    """
    name, case, impl, key = source.split()
    number, unit = figure.split()
    for row in _rows(name):
        if (row["case"], row["impl"]) == (case, impl):
            value: Any = row
            for part in key.split("."):
                value = value[part]
            digits = len(number.partition(".")[2])
            scale = _SCALES.get((unit, key.split("_")[-1]), 1.0)
            return f"{value * scale:,.{digits}f} {unit}"
    raise KeyError(f"bench/results/{name}.json has no row of {case} by {impl}")


@cache
def _rows(name: str) -> list[dict[str, Any]]:
    path = ROOT / f"bench/results/{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows
