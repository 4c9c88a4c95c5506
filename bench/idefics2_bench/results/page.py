"""Show results files as one page and as SVG: ``idefics2 bench report``.

    idefics2 bench report h100-kernels.json h200-kernels.json -o report.html
    idefics2 bench report bench/results/*.json -o report.html --svg charts

The page has charts and tables. It needs no network and no scripts, and is light or dark as the
reader's system. With --svg each chart is also a file, for a README.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idefics2_bench.results.chart_looks import is_kernel, is_ours
from idefics2_bench.results.result_charts import charts_of
from idefics2_bench.results.results_file import ResultsFile, Row, read_results
from idefics2_bench.results.step_charts import steps_table
from idefics2_bench.steps.parts import is_part
from idefics2_engine.charts.drawing import svg_file
from idefics2_engine.errors import Idefics2Error
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

_RATE = "_per_s"
# Longer tables are folded
_MOST_ROWS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Write a page with the arguments ``argv``, or those of the command line; return 0.

    Raises:
        ConfigError: A file is no results file.
        Idefics2Error: The page or a chart cannot be written.
    """
    options = _parser().parse_args(argv)
    files = read_results(options.files)
    write_page(options.output, files)
    if options.svg is not None:
        write_charts(options.svg, files)
    return 0


def add_report_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--report`` to the parser of a suite."""
    parser.add_argument(
        "--report",
        type=_page_path,
        metavar="PAGE.html",
        help="file to write the rows to as a page of charts and tables",
    )


def write_report(path: Path | None, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the page of a suite's rows to ``path``, or nothing if it is ``None``."""
    if path is not None:
        write_page(path, [ResultsFile(path.stem, about, rows)])


def write_page(path: Path, files: Sequence[ResultsFile]) -> None:
    """Write the page of ``files`` to ``path``.

    Raises:
        Idefics2Error: The file cannot be written.
    """
    _write(path, render_page(page_of(files)))


def write_charts(folder: Path, files: Sequence[ResultsFile]) -> None:
    """Write each chart of ``files`` as an SVG file into ``folder``, which is made if needed.

    Raises:
        Idefics2Error: A file cannot be written.
    """
    for named in charts_of(files):
        _write(folder / f"{named.name}.svg", svg_file(named.chart))


def page_of(files: Sequence[ResultsFile]) -> Page:
    """Return the page of ``files``."""
    machines = dict.fromkeys(_machine(file) for file in files)
    tables = [_file_table(files), _kernel_table(files), _model_table(files), steps_table(files)]
    return Page(
        "Benchmarks",
        ", ".join(machines),
        _figures(files),
        [table for table in tables if table is not None],
        charts=[named.chart for named in charts_of(files)],
    )


def _figures(files: Sequence[ResultsFile]) -> list[Figure]:
    rows = [row for file in files for row in file.rows if not file.is_peer(row)]
    ours = [row for file in files for row in file.rows if is_ours(file, row)]
    ratios = [row["speedup"] for row in ours if "speedup" in row]
    failed = sum("ms" not in row for row in rows)
    figures = [
        Figure("Files", f"{len(files)}"),
        Figure("Rows", f"{len(rows):,}", "peers apart"),
    ]
    if ratios:
        faster = sum(ratio >= 1 for ratio in ratios)
        median = statistics.median(ratios)
        figures += [
            Figure("Median over the fastest peer", f"{median:.2f} x", f"{len(ratios)} cases"),
            Figure(
                "At least as fast as the fastest peer",
                f"{faster / len(ratios):.0%}",
                f"{faster} cases",
            ),
        ]
    if failed:
        figures.append(Figure("Wrong or failed", f"{failed}", is_bad=True))
    return figures


def _file_table(files: Sequence[ResultsFile]) -> Table:
    columns = [
        *(Column("File", "name"), Column("Machine"), Column("Versions")),
        *(Column("Commit, date"), Column("Measured ceilings")),
    ]
    rows = []
    for file in files:
        about = file.machine
        versions = [
            f"{key} {about[key]}"
            for key in ("torch", "triton", "python", "driver")
            if about.get(key)
        ]
        ceilings = [
            f"{about[key]} {unit}"
            for key, unit in (("copy_TBps", "TB/s"), ("matmul_TFLOPs", "TFLOP/s"))
            if about.get(key)
        ]
        when = ", ".join(str(about[key]) for key in ("commit", "date") if about.get(key))
        rows.append(
            TableRow(
                [
                    _cell(file.name, "strong"),
                    *(_cell(_machine(file)), _cell(", ".join(versions))),
                    *(_cell(when), _cell(", ".join(ceilings))),
                ]
            )
        )
    return Table("Files", columns, rows)


def _kernel_table(files: Sequence[ResultsFile]) -> Table | None:
    """Return a row for each operation and file: its cases, and the ratios to the best peer."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for file in files:
        for row in file.rows:
            if is_kernel(row) and is_ours(file, row):
                groups.setdefault((row["kernel"], row["impl"], file.name), []).append(row)
    if not groups:
        return None
    columns = [
        *(Column("Kernel", "name"), Column("File"), Column("Cases", "number")),
        *(Column("Of the roofline", "number"), Column("Slowest, x peer", "number")),
        *(Column("Median, x peer", "number"), Column("Fastest, x peer", "number")),
    ]
    rows = []
    for (kernel, impl, name), own in sorted(groups.items()):
        ratios = sorted(row["speedup"] for row in own if "speedup" in row)
        shares = [row["roofline"] for row in own if "roofline" in row]
        wrong = sum("ms" not in row for row in own)
        cases = f"{len(own)}" + (f", {wrong} wrong" if wrong else "")
        ends = [ratios[0], statistics.median(ratios), ratios[-1]] if ratios else []
        cells = [
            _cell(kernel if impl == "triton" else f"{kernel}, {impl}", "strong"),
            *(_cell(name, "muted"), _cell(cases)),
            _cell(f"{statistics.median(shares):.0%}" if shares else ""),
            *(_cell(f"{end:.2f}") for end in ends),
        ]
        rows.append(TableRow([*cells, *([[]] * (len(columns) - len(cells)))], wrong > 0))
    note = "Medians over the cases at the model's shapes."
    return Table("Kernels", columns, rows, note, is_folded=len(rows) > _MOST_ROWS)


def _model_table(files: Sequence[ResultsFile]) -> Table | None:
    """Return all rows that are neither of kernels nor of parts of steps."""
    columns = [
        *(Column("Case", "name"), Column("File"), Column("Implementation")),
        *(Column("ms", "number"), Column("In a second"), Column("x peer", "number")),
    ]
    rows = []
    for file in files:
        for row in file.rows:
            if is_kernel(row) or is_part(row):
                continue
            head = [_cell(row["case"], "strong"), _cell(file.name, "muted"), _cell(row["impl"])]
            rows.append(TableRow([*head, *_model_figures(row)], is_bad="ms" not in row))
    is_folded = len(rows) > _MOST_ROWS
    return Table("The whole model", columns, rows, is_folded=is_folded) if rows else None


def _model_figures(row: Row) -> list[Cell]:
    if "ms" not in row:
        return [_cell("failed" if "error" in row else "wrong", "error"), [], []]
    ms = f"{row['ms']:,.4g}" if row["ms"] < 1e4 else f"{row['ms']:,.0f}"
    rates = ", ".join(
        f"{value:,.4g} {key.removesuffix(_RATE).replace('_', ' ')}"
        for key, value in row.items()
        if key.endswith(_RATE)
    )
    return [_cell(ms), _cell(rates), _cell(f"{row['speedup']:.2f}" if "speedup" in row else "")]


def _machine(file: ResultsFile) -> str:
    about = file.machine
    if about.get("gpu"):
        return str(about["gpu"])
    # The name of a CPU from the other suites has the number of its cores
    cores = f"{about['cores']} cores" if "cores" in about else ""
    return ", ".join(str(part) for part in (about.get("cpu"), cores) if part) or "unknown machine"


def _cell(text: str, style: str = "") -> Cell:
    return [Text(text, style)] if text else []


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise Idefics2Error(f"{path}: cannot be written: {error.strerror}") from None


def _page_path(value: str) -> Path:
    """Return the path of a page, whose folder is checked before the suite runs."""
    path = Path(value)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {value!r}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="idefics2 bench report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE.json", help="files of idefics2 bench --json")
    add("-o", "--output", type=Path, required=True, metavar="PAGE.html", help="the page")
    add("--svg", type=Path, metavar="FOLDER", help="write each chart as an SVG file, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
