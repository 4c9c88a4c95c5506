"""Results as a table, as JSON, and as the tables of ``docs/kernels``.

``make docs-generate`` renews the tables from the catalog and the recorded results.
"""

import json
import re
from pathlib import Path
from typing import Any

from idefics2_kernels.catalog import CATALOG

Row = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
_SHOWN = _ROOT / "bench/results/h200-kernels.json"
_PAGES = _ROOT / "docs/kernels"
TABLE_BEGIN, TABLE_END = "<!-- kernels -->\n", "<!-- /kernels -->"
_SLOWER = re.compile(r"(<!-- slower -->\n).*?(<!-- /slower -->)", re.DOTALL)
_FIGURES = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def line(row: Row) -> str:
    """Return a kernel's row as a line for the terminal."""
    head = f"{row['kernel']:20} {row['case']:20} {row['impl']:14}"
    if "ms" not in row:
        return f"{head} WRONG: {row['error']:.2f} times the allowed error"
    spread = f"{row['ms_p20'] * 1e3:.1f}-{row['ms_p80'] * 1e3:.1f}"
    figures = (
        f"{row['ms'] * 1e3:10.1f} us ({spread}) {row['TFLOPs']:7.1f} TFLOP/s "
        f"{row['GBps']:7.0f} GB/s"
    )
    beside = f"  {row['speedup']:.2f}x {row['peer']}" if "speedup" in row else ""
    base = f"  {row['base_speedup']:.2f}x base" if "base_speedup" in row else ""
    return f"{head} {figures} {row['roofline']:5.0%}{beside}{base}"


def table(about: dict[str, Any], rows: list[Row]) -> str:
    """Return kernels' rows as a Markdown table, below a line about the machine."""
    lines = [
        f"{about['gpu']}, torch {about['torch']}, Triton {about['triton']}, "
        f"commit {about['commit']}, {about['date']}; "
        f"copy {about['copy_TBps']} TB/s, bf16 product {about['matmul_TFLOPs']} TFLOP/s",
        "",
        "| kernel | case | implementation | us | TFLOP/s | GB/s | of roofline | best peer "
        "| speedup |",
        "|---|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        head = f"| {row['kernel']} | {row['case']} | {row['impl']} |"
        if "ms" not in row:
            lines.append(f"{head} wrong | | | | | |")
            continue
        peer = f"{row['peer']}, {row['peer_ms'] * 1e3:.1f} us" if "peer" in row else ""
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
        lines.append(
            f"{head} {row['ms'] * 1e3:.1f} | {row['TFLOPs']:.0f} | {row['GBps']:.0f} | "
            f"{row['roofline']:.0%} | {peer} | {speedup} |"
        )
    return "\n".join(lines)


def whole_line(row: Row) -> str:
    """Return a row of the whole model as a line for the terminal."""
    head = f"{row['kernel']:8} {row['case']:20} {row['impl']:22}"
    if "error" in row:
        return f"{head} FAILED: {row['error']}"
    if "beside_GB" in row:
        return f"{head} {row['beside_GB']:10.2f} GB beside weights and KV cache"
    if "ms" not in row:
        return f"{head} WRONG: the result is not finite"
    spread = f" ({row['ms_p20']:.2f}-{row['ms_p80']:.2f})" if "ms_p20" in row else ""
    beside = f"  {row['speedup']:.2f}x {row['peer']}" if "speedup" in row else ""
    return f"{head} {row['ms']:10.2f} ms{spread}  {_rates(row)}{beside}"


def whole_table(about: dict[str, Any], rows: list[Row]) -> str:
    """Return rows of the whole model as a Markdown table, below a line about the machine."""
    name = about["gpu"] or about["cpu"]
    if "loop_seconds" in about:
        name = f"{name}, Python's loop {about['loop_seconds']} s"
    lines = [
        f"{name}, torch {about['torch']}, Triton {about['triton']}, commit {about['commit']}, "
        f"{about['date']}",
        "",
        "| kernel | case | implementation | model | ms | in a second | peak GB | best peer "
        "| speedup |",
        "|---|---|---|---|---:|---|---:|---|---:|",
    ]
    for row in rows:
        head = (
            f"| {row['kernel']} | {row['case']} | {row['impl']} | {row['model']}, {row['dtype']} |"
        )
        if "beside_GB" in row:
            lines.append(
                f"{head} | {row['beside_GB']:.2f} GB beside weights and KV cache "
                f"| {row['peak_GB']:.1f} | | |"
            )
            continue
        if "ms" not in row:
            lines.append(f"{head} {'failed' if 'error' in row else 'wrong'} | | | | |")
            continue
        memory = f"{row['peak_GB']:.1f}" if "peak_GB" in row else ""
        peer = f"{row['peer']}, {row['peer_ms']:.2f} ms" if "peer" in row else ""
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
        lines.append(f"{head} {row['ms']:.2f} | {_rates(row)} | {memory} | {peer} | {speedup} |")
    return "\n".join(lines)


def _rates(row: Row) -> str:
    ending = "_per_s"
    rates = {k.removesuffix(ending): v for k, v in row.items() if k.endswith(ending)}
    return ", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in rates.items())


def write_json(path: Path | None, about: dict[str, Any], rows: list[Row]) -> None:
    """Write ``rows`` to ``path``, or nothing if it is ``None``.

    The file's rows of other cases are kept if GPU, commit, PyTorch and Triton are the same. A suite
    calls this after each case, so an interrupted run keeps the rows of the cases it has finished.
    """
    if path is None:
        return
    new = {(row["kernel"], row["case"]) for row in rows}
    kept: list[Row] = []
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if all(
            old["machine"].get(key) == about[key] for key in ("gpu", "commit", "torch", "triton")
        ):
            kept = [row for row in old["rows"] if (row["kernel"], row["case"]) not in new]
    text = json.dumps({"machine": about, "rows": [*kept, *rows]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def kernel_table(results: list[Row]) -> str:
    """Return the index's table: each operation, its number of cases, and its best figure."""
    lines = [
        "| operation | computes | cases | measured |",
        "|---|---|---:|---|",
    ]
    for spec in CATALOG:
        kernel = next(iter(spec.implementations.values()))
        summary = (kernel.__doc__ or "").strip().splitlines()[0].replace("``", "`").rstrip(".")
        own = [row for row in results if row["kernel"] == spec.name and "ms" in row]
        own = [row for row in own if row["impl"] in spec.implementations]
        best = max(own, key=lambda row: row["roofline"], default=None)
        figure = "not yet"
        if best is not None:
            figure = (
                f"{best['case']}: {best['ms'] * 1e3:.0f} us, {best['roofline']:.0%} of roofline"
            )
            if "speedup" in best:
                figure += f", {best['speedup']:.2f} x {best['peer']}"
        page = f"[`{spec.name}`]({spec.name}.md)"
        lines.append(f"| {page} | {summary} | {len(spec.cases)} | {figure} |")
    return "\n".join(lines) + "\n"


def slower_table(results: list[Row]) -> str:
    """Return a table of the ``TRITON`` cases whose speedup over the best peer is below 0.995."""
    lines = [
        "| operation | case | us | best peer, us | x |",
        "|---|---|---:|---|---:|",
    ]
    for row in results:
        if row["impl"] == "triton" and round(row.get("speedup", 1.0), 2) < 1:
            lines.append(
                f"| `{row['kernel']}` | {row['case']} | {row['ms'] * 1e3:.1f} | "
                f"{row['peer']}, {row['peer_ms'] * 1e3:.1f} | {row['speedup']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def recorded() -> list[Row]:
    """Return the recorded rows that the tables of ``docs/kernels`` show, all of one machine."""
    rows: list[Row] = json.loads(_SHOWN.read_text(encoding="utf-8"))["rows"]
    return rows


def with_table(index: str) -> str:
    """Return the text ``index`` with its tables renewed from the catalog and the results."""
    results = recorded()
    head, rest = index.split(TABLE_BEGIN)
    _, tail = rest.split(TABLE_END)
    tail = _SLOWER.sub(lambda m: f"{m[1]}{slower_table(results)}{m[2]}", tail)
    return f"{head}{TABLE_BEGIN}{kernel_table(results)}{TABLE_END}{tail}"


def figures_table(kernel: str, results: list[Row]) -> str:
    """Return an operation's table: each case and implementation, and its best peer."""
    (spec,) = [spec for spec in CATALOG if spec.name == kernel]
    own = [row for row in results if row["kernel"] == kernel and "ms" in row]
    lines = [
        "| case | implementation | us | TFLOP/s | GB/s | FLOP/byte | of roofline | best peer, us |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in own:
        if row["impl"] not in spec.implementations:
            continue
        peer = f"{row['peer']}, {row['peer_ms'] * 1e3:.1f}" if "peer" in row else ""
        lines.append(
            f"| {row['case']} | {row['impl']} | {row['ms'] * 1e3:.1f} | {row['TFLOPs']:.3g} "
            f"| {row['GBps']:.0f} | {1e3 * row['TFLOPs'] / row['GBps']:.3g} "
            f"| {row['roofline']:.0%} | {peer} |"
        )
    return "\n".join(lines) + "\n"


def with_figures(page: str) -> str:
    """Return the text ``page`` with its tables of figures renewed from the results."""
    results = recorded()
    return _FIGURES.sub(lambda m: f"{m[1]}{figures_table(m[2], results)}{m[3]}", page)


def renewed_pages() -> dict[Path, str]:
    """Return the kernels' index and the page of each operation, with their tables renewed."""
    index = _PAGES / "README.md"
    renewed = {index: with_table(index.read_text(encoding="utf-8"))}
    for spec in CATALOG:
        page = _PAGES / f"{spec.name}.md"
        renewed[page] = with_figures(page.read_text(encoding="utf-8"))
    return renewed
