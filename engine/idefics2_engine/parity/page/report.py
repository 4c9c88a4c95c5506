"""A comparison as one page, and its heat maps as files."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from idefics2_engine.charts.drawing import svg_file
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.model_files import printable_path
from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.page.heat_maps import heat_maps, why_no_maps
from idefics2_engine.parity.result import Comparison, StageResult
from idefics2_engine.parity.words import bisection_line, headline, place_text, replaced_text
from idefics2_engine.report_page import (
    Cell,
    Column,
    Figure,
    Page,
    Table,
    TableRow,
    Text,
    render_page,
)

# A longer table of stages is folded
_MOST_ROWS = 40
# Of the files of heat maps
_MAP_NAME = re.compile(r"case-\d+-(tokens|image-\d+)\.svg")
_VERSIONS = ("idefics2_engine", "transformers", "torch")


def write_report(comparison: Comparison, path: str | pathlib.Path) -> None:
    """Write a comparison as one page, which needs no network and no other file.

    Raises:
        Idefics2Error: The file cannot be written.
    """
    _write(pathlib.Path(path), render_page(page_of(comparison)))


def write_heat_maps(comparison: Comparison, folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Write each heat map of a comparison as an SVG file into ``folder``, which is made if needed.

    Maps that are there already are removed, so that none is of another comparison.

    Returns:
        The files. There are none if every bit is the same, or if one side is a digest.

    Raises:
        Idefics2Error: A file cannot be written or removed.
    """
    files = {
        pathlib.Path(folder) / f"{named.name}.svg": named.chart for named in heat_maps(comparison)
    }
    for old in pathlib.Path(folder).glob("case-*.svg"):
        if _MAP_NAME.fullmatch(old.name):
            _remove(old)
    for file, chart in files.items():
        _write(file, svg_file(chart))
    return list(files)


def page_of(comparison: Comparison) -> Page:
    """Return the page of a comparison."""
    maps = heat_maps(comparison)
    tables = [
        _partings(comparison),
        _disagreements(comparison),
        _sides(comparison),
    ]
    lines = [headline(comparison)]
    if comparison.bisection is not None:
        lines.append(bisection_line(comparison.bisection))
    return Page(
        f"{comparison.a['path']} and {comparison.b['path']}",
        " ".join(f"{line[0].upper()}{line[1:]}." for line in lines),
        [*_figures(comparison), _maps_figure(comparison, {named.case for named in maps})],
        [table for table in tables if table is not None],
        charts=[named.chart for named in maps],
        first_tables=[_stages(comparison)],
    )


def _figures(comparison: Comparison) -> list[Figure]:
    first = comparison.first_difference
    if first is not None:
        found = Figure("First difference", first.stage, "beyond rounding", is_bad=True)
    elif comparison.same_bits:
        found = Figure("Differences", "none", "same bits at every stage")
    elif comparison.within_rounding:
        found = Figure("Differences", "none", "beyond rounding")
    else:
        found = Figure("Differences", "not judged", "no float64 leg")
    counts = {
        verdict: sum(one.verdict is verdict for one in comparison.stages) for verdict in Verdict
    }
    passed = counts[Verdict.SAME_BITS] + counts[Verdict.WITHIN_ROUNDING]
    words = {**{verdict: str(verdict) for verdict in Verdict}, Verdict.DIFFERS: "with differences"}
    listed = ", ".join(f"{count} {words[verdict]}" for verdict, count in counts.items() if count)
    figures = [found, Figure("Stages that pass", f"{passed} of {len(comparison.stages)}", listed)]
    logits = comparison.logits
    if logits is not None:
        tokens = f"of {logits.num_rows:,} tokens"
        if logits.top1_agreement < 1:
            tokens += f", margin at most {logits.largest_margin:.2g}"
        figures += [
            Figure("Same best token", f"{logits.top1_agreement:.2%}", tokens),
            Figure("Largest KL", f"{logits.largest_kl:.2g}", f"mean {logits.mean_kl:.2g}, in nats"),
        ]
    # Answers to unequal prompts are not counted
    if all(one.measure.note is None for one in comparison.stages if one.stage == stages.TOKENS):
        same = comparison.num_cases - len(comparison.partings)
        figures.append(Figure("Same answers", f"{same} of {comparison.num_cases}"))
    return figures


def _maps_figure(comparison: Comparison, shown: set[int]) -> Figure:
    """Return how many cases have heat maps, and which have none."""
    reason = why_no_maps(comparison)
    if reason is not None:
        return Figure("Cases with maps", "0", reason)
    left_out = [str(case) for case in range(comparison.num_cases) if case not in shown]
    note = f"the worst first, without {', '.join(left_out)}" if left_out else "the worst first"
    return Figure("Cases with maps", f"{len(shown)} of {comparison.num_cases}", note)


def _sides(comparison: Comparison) -> Table:
    columns = [
        *(Column("Side", "label"), Column("Path"), Column("Dtype")),
        *(Column("Device"), Column("Model"), Column("Versions")),
    ]
    rows = []
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        dtype = side["dtype"] + (", weights in NF4" if side["nf4"] else "")
        remarks = [replaced_text(side), "a digest" if side["digest"] else ""]
        path = [Text(side["path"]), *(Text(one, "muted") for one in remarks if one)]
        versions = ", ".join(f"{key} {side[key]}" for key in _VERSIONS if key in side)
        cells = [_cell(dtype), _cell(side["device"]), _cell(side["model"]), _cell(versions)]
        rows.append(TableRow([_cell(name, "strong"), path, *cells]))
    judged = "Judged against float64." if comparison.is_judged else "Not judged: no float64 leg."
    return Table("Sides", columns, rows, judged)


def _stages(comparison: Comparison) -> Table:
    columns = [
        *(Column("Stage", "label"), Column("Verdict", "name"), Column("Largest", "number")),
        *(Column("Median", "number"), Column("A/B", "number"), Column("B/A", "number")),
        Column("Largest at"),
    ]
    rows = [_stage(one) for one in comparison.stages]
    note = (
        "Differences of A and B in a row, relative to the row's largest value. A/B and B/A are the "
        "errors against float64 as multiples of the other side's."
    )
    return Table("Stages", columns, rows, note, is_folded=len(rows) > _MOST_ROWS)


def _stage(result: StageResult) -> TableRow:
    measure = result.measure
    is_bad = result.verdict is Verdict.DIFFERS
    figures: list[Cell] = [[], [], [], []]
    if not measure.same_bits and measure.largest:
        figures[:2] = [_cell(f"{measure.largest:.1e}"), _cell(f"{measure.median:.1e}")]
    if result.ratios is not None and not measure.same_bits:
        figures[2:] = [
            _cell(f"{ratio:.2f}" if ratio < 100 else f"{ratio:.1e}") for ratio in result.ratios
        ]
    verdict = _cell(str(result.verdict), "error strong" if is_bad else "muted")
    where = _cell(measure.note or place_text(measure.place))
    return TableRow([_cell(result.stage, "strong"), verdict, *figures, where], is_bad)


def _partings(comparison: Comparison) -> Table | None:
    """Return where answers part, or ``None`` if they are equal."""
    columns = [
        *(Column("Case", "label"), Column("Token of the answer", "number")),
        *(Column("A", "number"), Column("B", "number")),
        *(Column("Margin", "number"), Column("Explained by rounding", "number")),
    ]
    rows = []
    for one in comparison.partings:
        tokens = [_cell("the end" if token is None else str(token)) for token in one.tokens]
        cells = [_cell(f"{one.case}", "strong"), _cell(f"{one.index}"), *tokens]
        figures = [_cell(f"{one.margin:.2g}"), _cell(f"{one.room:.2g}")]
        rows.append(TableRow([*cells, *figures], not one.is_near_tie))
    note = (
        "The margin is that of the two tokens' logits in float64, or in B. It is explained if the "
        "errors of both sides are as large."
    )
    return Table("Answers that part", columns, rows, note) if rows else None


def _disagreements(comparison: Comparison) -> Table | None:
    """Return the first tokens with another best successor, or ``None`` if there are none."""
    found: Sequence[Mapping[str, Any]] = (
        comparison.logits.disagreements if comparison.logits else []
    )
    columns = [Column("Token", "label"), *(Column(name, "number") for name in ("A", "B", "Margin"))]
    rows = []
    for one in found:
        place = {name: one[name] for name in ("case", "token", "token_text")}
        best = [_cell(str(token)) for token in one["best"]]
        rows.append(TableRow([_cell(place_text(place)), *best, _cell(f"{one['margin']:.2g}")]))
    return Table("Another best token", columns, rows, "The first of them.") if rows else None


def _cell(text: str, style: str = "") -> Cell:
    return [Text(text, style)] if text else []


def _remove(path: pathlib.Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise Idefics2Error(
            f"{printable_path(path)}: cannot be removed: {error.strerror}"
        ) from None


def _write(path: pathlib.Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise Idefics2Error(
            f"{printable_path(path)}: cannot be written: {error.strerror}"
        ) from None
