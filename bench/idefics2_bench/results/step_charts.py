"""Charts of steps by operation, each part beside its floor."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from idefics2_bench.results.chart_looks import time_text
from idefics2_bench.results.results_file import ResultsFile, Row
from idefics2_bench.steps.parts import BETWEEN, FAMILIES, KERNEL, OTHER, OUTSIDE, WHOLE, family
from idefics2_engine.charts.axis import linear_axis
from idefics2_engine.charts.drawing import Key, Mark
from idefics2_engine.charts.row_chart import Bar, ChartRow, Dot, RowChart
from idefics2_engine.report_page import Column, Table, TableRow, Text

_FLOOR = Mark(None, "tick")
_FLOOR_KEY = Key((_FLOOR,), "floor")
_COLORS: dict[str, int | None] = {name: number for number, name in enumerate(FAMILIES)}
_COLORS |= {BETWEEN: None, OUTSIDE: None, OTHER: 7}
# Shorter parts are one row
_LEAST_SHARE = 0.01


def step_charts(files: Sequence[ResultsFile]) -> Iterator[tuple[str, RowChart]]:
    """Yield the name and the chart of all steps, and then of each step."""
    steps = [(file, *step) for file in files for step in _steps(file)]
    if not steps:
        return
    yield "steps", _all_steps(steps)
    seen: Counter[str] = Counter()
    for file, whole, parts in steps:
        # A case is a text from a file, and the name is that of a file
        name = "step-" + re.sub(r"[^\w-]+", "-", whole["case"])
        seen[name] += 1
        number = f"-{seen[name]}" if seen[name] > 1 else ""
        yield f"{name}{number}", _one_step(file, whole, parts)


def _steps(file: ResultsFile) -> Iterator[tuple[Row, list[Row]]]:
    """Yield the row of each step, and those of its parts."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in file.timed:
        if row["kernel"] == KERNEL:
            name = (row["case"], row["impl"], str(row.get("model")), str(row.get("dtype")))
            groups.setdefault(name, []).append(row)
    for own in groups.values():
        parts = [row for row in own if row["operation"] != WHOLE]
        wholes = [row for row in own if row["operation"] == WHOLE and "floor_ms" in row]
        if wholes and parts:
            yield wholes[0], parts


def _all_steps(steps: Sequence[tuple[ResultsFile, Row, list[Row]]]) -> RowChart:
    """Return the shares of families in each step, and the step's floor."""
    rows, most, shown = [], 100.0, set()
    for file, whole, parts in steps:
        total = sum(part["ms"] for part in parts)
        shares = dict.fromkeys(FAMILIES, 0.0)
        for part in parts:
            shares[family(part["operation"])] += 100 * part["ms"] / total
        shown |= {name for name, share in shares.items() if share}
        floor = 100 * whole["floor_ms"] / whole["ms"]
        most = max(most, floor)
        bars = [
            Bar(share, _COLORS[name], f"{name}: {share:.1f} %")
            for name, share in shares.items()
            if share
        ]
        title = f"floor {time_text(whole['floor_ms'])} of {time_text(whole['ms'])}"
        remark = f"{time_text(whole['ms'])}, {whole['ms'] / whole['floor_ms']:.2f} x floor"
        rows.append(ChartRow(whole["case"], file.name, bars, [Dot(floor, _FLOOR, title)], remark))
    return RowChart(
        "Steps by operation",
        linear_axis("% of the step", [most]),
        rows,
        [*_family_keys(shown), _FLOOR_KEY],
        "The floor is the time that the bytes and FLOP of a step's operations take at the bandwidth "
        "and the rate that were measured in the same run.",
    )


def _one_step(file: ResultsFile, whole: Row, parts: Sequence[Row]) -> RowChart:
    """Return the time of each part, and its floor."""
    total = sum(part["ms"] for part in parts)
    long = [part for part in parts if part["ms"] / total >= _LEAST_SHARE]
    short = [part for part in parts if part["ms"] / total < _LEAST_SHARE]
    rows = []
    for part in long:
        share = f"{part['ms'] / total:.0%}"
        calls = f", {part['calls']} calls" if "calls" in part else ""
        title = f"{part['operation']}: {time_text(part['ms'])}, {share}{calls}"
        bars = [Bar(part["ms"], _COLORS[family(part["operation"])], title)]
        if "floor_ms" not in part:
            rows.append(ChartRow(part["operation"], "", bars, remark=share))
            continue
        dots = [Dot(part["floor_ms"], _FLOOR, f"floor {time_text(part['floor_ms'])}")]
        remark = f"{share}, {part['ms'] / part['floor_ms']:.3g} x floor"
        rows.append(ChartRow(part["operation"], "", bars, dots, remark))
    if short:
        ms = sum(part["ms"] for part in short)
        names = ", ".join(part["operation"] for part in short)
        remark = f"{ms / total:.1%}"
        rows.append(ChartRow(f"{len(short)} more", "", [Bar(ms, None, names)], remark=remark))
    values = [part["ms"] for part in long] + [part.get("floor_ms", 0.0) for part in long]
    shown = {family(part["operation"]) for part in long}
    return RowChart(
        f"{whole['case']} by operation",
        linear_axis("ms a step", values),
        rows,
        [*_family_keys(shown), _FLOOR_KEY],
        f"{file.name}, {whole['impl']}: {time_text(whole['ms'])} a step, floor "
        f"{time_text(whole['floor_ms'])}. The parts were traced and add up to {time_text(total)}.",
    )


def _family_keys(shown: set[str]) -> list[Key]:
    return [Key((Mark(_COLORS[name], "square"),), name) for name in FAMILIES if name in shown]


def steps_table(files: Sequence[ResultsFile]) -> Table | None:
    """Return a folded table of all parts of all steps, or ``None`` if there are none."""
    columns = [
        *(Column("Step", "name"), Column("File"), Column("Operation"), Column("Calls", "number")),
        *(Column("ms", "number"), Column("Share", "number"), Column("MB", "number")),
        *(Column("GFLOP", "number"), Column("Floor, ms", "number"), Column("x floor", "number")),
    ]
    rows = []
    for file in files:
        for whole, parts in _steps(file):
            total = sum(part["ms"] for part in parts)
            for part in parts:
                texts = [file.name, part["operation"], f"{part.get('calls', '')}"]
                texts += [f"{part['ms']:.4g}", f"{part['ms'] / total:.1%}"]
                if "floor_ms" in part:
                    texts += [
                        f"{part.get('bytes', 0) / 1e6:,.4g}",
                        f"{part.get('flops', 0) / 1e9:,.4g}",
                    ]
                    texts += [f"{part['floor_ms']:.4g}", f"{part['ms'] / part['floor_ms']:.2f}"]
                texts += [""] * (len(columns) - 1 - len(texts))
                cells = [[Text(text)] if text else [] for text in texts]
                rows.append(TableRow([[Text(whole["case"], "strong")], *cells]))
    note = "A floor is that of the calls' bytes and FLOP, at the ceilings of the same run."
    return Table("Parts of steps", columns, rows, note, is_folded=True) if rows else None
