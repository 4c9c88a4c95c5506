"""The lines that ``idefics2 parity`` prints for people."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from idefics2_engine.parity.words import bisection_line, headline, place_text, replaced_text

if TYPE_CHECKING:
    from idefics2_engine.parity.result import Comparison, StageResult

_HEADINGS = ("stage", "verdict", "largest", "median", "A/B", "B/A", "largest at")


def comparison_lines(comparison: "Comparison") -> list[str]:
    """Return what was compared, a line for each stage, and the first difference."""
    lines = [path_line("A", comparison.a), path_line("B", comparison.b)]
    judged = "judged against float64" if comparison.is_judged else "not judged: no float64 leg"
    count = comparison.num_cases
    lines += [f"{count} case{'s' if count > 1 else ''}, {judged}", ""]
    rows = [_HEADINGS, *map(_row, comparison.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 1, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    if comparison.logits is not None:
        found = comparison.logits
        lines.append(
            f"best token: {found.top1_agreement:.2%} of {found.num_rows} agree, largest margin "
            f"where not {found.largest_margin:.2g}; KL at most {found.largest_kl:.2g} nats"
        )
    for parting in comparison.partings:
        names = ["the end" if token is None else str(token) for token in parting.tokens]
        lines.append(
            f"case {parting.case}: answers part at token {parting.index}, "
            f"{names[0]} and {names[1]}, margin {parting.margin:.2g}"
        )
    lines.append(headline(comparison))
    if comparison.bisection is not None:
        lines.append(bisection_line(comparison.bisection))
    return lines


def path_line(name: str, path: Mapping[str, Any]) -> str:
    """Return what computed a side, in one line."""
    versions = [f"{key} {path[key]}" for key in ("transformers", "torch") if key in path]
    about = [f"{path['dtype']} on {path['device']}", replaced_text(path), *versions]
    return f"{name}  {path['path']}: {', '.join(filter(None, about))}"


def _row(result: "StageResult") -> tuple[str, ...]:
    measure = result.measure
    figures = ["", "", "", ""]
    if not measure.same_bits and measure.largest:
        figures[:2] = [f"{measure.largest:.1e}", f"{measure.median:.1e}"]
    if result.ratios is not None and not measure.same_bits:
        figures[2:] = [f"{ratio:.2f}" for ratio in result.ratios]
    where = measure.note or place_text(measure.place)
    return result.stage, str(result.verdict), *figures, where
