"""The page of ``--report``: figures of a job, then its first rows with pictures and answers."""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.shadow.shadow_figures import percentage, shadow_sentence
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.writers.own_file import replace_own_file
from idefics2_engine.jobs.writers.row_view import RowViews
from idefics2_engine.report_page import Column, Figure, Page, Table, TableRow, Text, render_page

REPORT_ROWS = 100
_MARK = "idefics2-job"


def write_report(
    path: Path,
    rows: Iterable[tuple[JobRow, Mapping[str, Any]]],
    summary: Mapping[str, Any],
    media: MediaConfig,
    *,
    title: str,
    subtitle: str = "",
    fingerprint: str = "",
    max_rows: int = REPORT_ROWS,
    files: FileOperations | None = None,
) -> Path | None:
    """Write the page of a job, which needs no network and no other file.

    Args:
        path: The page.
        rows: Rows of the job, each with its row of the output, in order. Only the first
            ``max_rows`` are read.
        summary: As from ``summary_of``.
        media: Rules for reading images.
        title: Its title, such as the name of the output.
        subtitle: A line below it, such as model and device.
        fingerprint: The job's. An earlier page of the same job is replaced.
        max_rows: Rows that are shown.
        files: Calls of the operating system.

    Returns:
        The new name of another file that was moved aside.

    Raises:
        OSError: The page cannot be written.
    """
    views = RowViews(media)
    shown = [views.view(row, out) for row, out in islice(rows, max_rows)]
    num_rows = summary["rows"]["all"]
    which = "All rows." if len(shown) == num_rows else f"The first {len(shown)} of {num_rows:,}."
    columns = [
        *(Column("Row", "label"), Column("Images", "picture")),
        *(Column("Question"), Column("Answer")),
    ]
    tables = [_errors(summary), _shadow(summary), Table("Rows", columns, shown, which)]
    page = Page(
        title,
        subtitle,
        _figures(summary),
        [table for table in tables if table is not None],
        {_MARK: fingerprint},
    )
    mark = f'<meta name="{_MARK}" content="{fingerprint}">'.encode()
    return replace_own_file(files or FileOperations(), path, render_page(page), mark)


def _figures(summary: Mapping[str, Any]) -> list[Figure]:
    rows, tokens, run = summary["rows"], summary["tokens"], summary["run"]
    rates = run["per_second"]
    share = f"{rows['errors'] / rows['all']:.1%} of the rows" if rows["errors"] else ""
    figures = [
        Figure("Rows", f"{rows['all']:,}", f"{rows['answered']:,} answered"),
        Figure("Errors", f"{rows['errors']:,}", share, is_bad=rows["errors"] > 0),
        Figure("Images", f"{summary['images']:,}", _rate(rates["images"])),
        Figure("Prompt tokens", f"{tokens['prompt']:,}", f"{tokens['image']:,} of images"),
        Figure("New tokens", f"{tokens['completion']:,}", _rate(rates["completion_tokens"])),
    ]
    # A job that was resumed has rows of earlier runs
    earlier = rows["all"] - run["rows"]["all"]
    note = f"{earlier:,} rows are of earlier runs" if earlier else _rate(rates["rows"], " rows/s")
    figures.append(Figure("Time", _duration(run["seconds"]), note))
    shadow = summary.get("shadow")
    if shadow is not None and shadow["rows"]["compared"]:
        share, is_bad = percentage(shadow["top1_agreement"]), shadow["not_finite"] > 0
        note = f"on {shadow['tokens']:,} tokens"
        figures.append(Figure("Reference agrees", share, note, is_bad=is_bad))
    return figures


def _errors(summary: Mapping[str, Any]) -> Table | None:
    """Return the table of errors by code, the most frequent first, or ``None`` without errors."""
    if not summary["errors"]:
        return None
    counts = sorted(summary["errors"].items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [TableRow([[Text(code)], [Text(f"{count:,}")]]) for code, count in counts]
    return Table("Errors", [Column("Code"), Column("Rows", "number")], rows)


def _shadow(summary: Mapping[str, Any]) -> Table | None:
    """Return the rows that differ most from the reference, or ``None`` if none was compared."""
    shadow = summary.get("shadow")
    if shadow is None or not shadow["rows"]["compared"]:
        return None
    names = ("Same best token", "Largest KL", "Largest margin")
    columns = [Column("Row", "label"), *(Column(name, "number") for name in names)]
    rows = []
    for one in shadow["worst"]:
        values = (
            f"{percentage(one['top1_agreement'])} of {one['tokens']:,}",
            f"{one['largest_kl']:.2g}",
            f"{one['largest_margin']:.2g}",
        )
        cells = [[Text(str(one["id"]), "strong")], *([Text(value)] for value in values)]
        rows.append(TableRow(cells, is_bad=one["not_finite"] > 0))
    note = f"{shadow_sentence(shadow, summary['run']['shadow'])}. The rows that differ most:"
    return Table("Compared with the reference path", columns, rows, note)


def _rate(rate: float | None, unit: str = " a second") -> str:
    if rate is None:
        return ""
    return f"{rate:,.0f}{unit}" if rate >= 100 else f"{rate:.3g}{unit}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
