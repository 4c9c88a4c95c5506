"""Say which rows of a results file are faster or slower in another: ``idefics2 bench compare``.

    idefics2 bench compare before.json after.json
    idefics2 bench compare before.json after.json --threshold 3 --json

A row is slower or faster if the spreads of both files do not overlap: the 20th to the 80th
percentile, or the fastest to the slowest round. A row without a spread has that of --spread. Rows of
peers are not judged. Their median ratio shows how much of a difference is the machine's.

The exit code is 1 if a row of ours is slower than its spread and by more than --threshold, or has
no time any more. Parts of steps are listed, but only whole steps count.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from idefics2_bench.results.results_file import ResultsFile, Row, read_results, spread
from idefics2_bench.steps.parts import is_part
from idefics2_engine.errors import ConfigError

# What names a row in a table. ``operation`` is the part of a step, and empty for other rows
_SHOWN = ("kernel", "case", "impl", "operation")
_SAME_MACHINE = ("gpu", "cpu", "driver", "torch", "triton", "python")

Verdict = Literal["slower", "faster", "same", "lost"]


@dataclass(frozen=True)
class Change:
    """A row in two files.

    Attributes:
        kernel: The operation or the suite.
        case: The case.
        impl: The implementation.
        operation: The part of a step, in rows of ``idefics2 bench steps``.
        is_part: Whether it is a part, and not a whole step.
        is_peer: Whether it is a peer's row.
        a_ms: Its time in the first file.
        b_ms: Its time in the second one, or ``None`` if it failed or was wrong there.
        ratio: ``b_ms`` over ``a_ms``, so that more than 1 is slower.
        verdict: What the spreads say. ``lost`` is a row that has no time any more.
    """

    kernel: str
    case: str
    impl: str
    operation: str
    is_part: bool
    is_peer: bool
    a_ms: float
    b_ms: float | None
    ratio: float | None
    verdict: Verdict

    @property
    def name(self) -> str:
        """How the row is called in a table."""
        return _short_name((self.kernel, self.case, self.impl, self.operation))


@dataclass(frozen=True)
class Comparison:
    """Two files.

    Attributes:
        changes: Rows that both files have, with a time in the first one.
        only_a: Rows of the first file alone.
        only_b: Rows of the second file alone.
        machines: Facts about the machines that differ, by name.
    """

    changes: Sequence[Change]
    only_a: Sequence[str]
    only_b: Sequence[str]
    machines: dict[str, tuple[object, object]]

    @property
    def ours(self) -> list[Change]:
        """Changes of our rows, the slowest first."""
        own = [change for change in self.changes if not change.is_peer]
        return sorted(own, key=lambda change: -(change.ratio or float("inf")))

    @property
    def peers_ratio(self) -> float | None:
        """The median ratio of the peers' rows, if there are any."""
        ratios = [change.ratio for change in self.changes if change.is_peer and change.ratio]
        return statistics.median(ratios) if ratios else None

    def regressions(self, threshold: float) -> list[Change]:
        """Return our rows that are lost, or slower than their spread and by over ``threshold``.

        Parts of steps are left out. A part of a few microseconds says little, and its step has a row.
        """
        return [
            change
            for change in self.ours
            if not change.is_part
            and (
                change.verdict == "lost"
                or (change.verdict == "slower" and (change.ratio or 0) > 1 + threshold)
            )
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare with the arguments ``argv``, or those of the command line.

    Returns:
        The exit code: 1 if a row of ours is slower by more than the threshold or lost, else 0.

    Raises:
        ConfigError: A file is no results file, or the two have no row in common.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    for name in ("threshold", "spread"):
        if not 0 <= getattr(options, name) <= 100:
            parser.error(f"--{name} must be 0 to 100, in percent, got {getattr(options, name)}")
    a, b = read_results([options.a, options.b])
    found = compare(a, b, options.spread / 100)
    regressions = found.regressions(options.threshold / 100)
    if options.json:
        print(json.dumps(as_json(found, regressions, options.threshold), indent=1))
    else:
        print(as_table(found, a.name, b.name, options.threshold, show_all=options.all))
    return int(bool(regressions))


def compare(a: ResultsFile, b: ResultsFile, default_spread: float) -> Comparison:
    """Compare the rows of two files.

    Args:
        a: The first file.
        b: The second one.
        default_spread: The spread of a row that has none, as a share of its time on each side.

    Raises:
        ConfigError: There is no row that both files have.
    """
    before, after = _by_name(a), _by_name(b)
    changes = []
    for name, row in before.items():
        if name in after and "ms" in row:
            changes.append(_change(row, after[name], a.is_peer(row), default_spread))
    if not changes:
        raise ConfigError(f"{a.name} and {b.name} must have timed rows in common, got none")
    return Comparison(
        changes,
        [_short_name(name) for name in before if name not in after],
        [_short_name(name) for name in after if name not in before],
        {
            key: (a.machine.get(key), b.machine.get(key))
            for key in _SAME_MACHINE
            if a.machine.get(key) != b.machine.get(key)
        },
    )


def as_table(found: Comparison, a: str, b: str, threshold: float, *, show_all: bool = False) -> str:
    """Return a comparison for the terminal."""
    shown = [c for c in found.ours if show_all or c.verdict != "same"]
    lines = [
        f"{key}: {before} and {after}, so times differ for other reasons too"
        for key, (before, after) in found.machines.items()
    ]
    counts = {
        v: sum(c.verdict == v for c in found.ours) for v in ("slower", "faster", "same", "lost")
    }
    if shown:
        cells = [("", a, b, "ratio", "")]
        cells += [
            (
                change.name,
                _milliseconds(change.a_ms),
                _milliseconds(change.b_ms),
                f"{change.ratio:.3f}" if change.ratio else "",
                change.verdict,
            )
            for change in shown
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        for row in cells:
            first = row[0].ljust(widths[0])
            numbers = "  ".join(
                cell.rjust(w) for cell, w in zip(row[1:4], widths[1:4], strict=True)
            )
            lines.append(f"{first}  {numbers}  {row[4]}".rstrip())
        lines.append("")
    lost = f", {counts['lost']} lost" if counts["lost"] else ""
    lines.append(
        f"beyond the spread: {counts['slower']} slower, {counts['faster']} faster{lost}; "
        f"{counts['same']} the same"
    )
    if found.peers_ratio is not None:
        num = sum(change.is_peer for change in found.changes)
        lines.append(f"peers: {found.peers_ratio:.3f} times as long (median of {num} rows)")
    for name, only in ((a, found.only_a), (b, found.only_b)):
        if only:
            lines.append(f"only in {name}: {len(only)} rows, such as {only[0]}")
    num = len(found.regressions(threshold / 100))
    lines.append(f"slower by more than {threshold:g} %, or lost: {num}")
    return "\n".join(lines)


def as_json(found: Comparison, regressions: Sequence[Change], threshold: float) -> dict[str, Any]:
    """Return a comparison for programs."""
    return {
        "threshold_percent": threshold,
        "rows": [asdict(change) for change in found.changes],
        "regressions": [change.name for change in regressions],
        "peers_ratio": found.peers_ratio,
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "machines": {key: list(values) for key, values in found.machines.items()},
    }


def _change(a: Row, b: Row, is_peer: bool, default_spread: float) -> Change:
    kernel, case, impl, operation = (str(a.get(key, "")) for key in _SHOWN)
    names = (kernel, case, impl, operation, is_part(a), is_peer)
    if "ms" not in b:
        return Change(*names, a["ms"], None, None, "lost")
    (a_low, a_high), (b_low, b_high) = (_ends(row, default_spread) for row in (a, b))
    verdict: Verdict = "slower" if b_low > a_high else "faster" if b_high < a_low else "same"
    return Change(*names, a["ms"], b["ms"], b["ms"] / a["ms"], verdict)


def _ends(row: Row, default_spread: float) -> tuple[float, float]:
    return spread(row) or (row["ms"] * (1 - default_spread), row["ms"] * (1 + default_spread))


def _by_name(file: ResultsFile) -> dict[tuple[str, ...], Row]:
    # Times of different models are not compared
    names = (*_SHOWN, "model", "dtype")
    return {tuple(str(row.get(key, "")) for key in names): row for row in file.rows}


def _short_name(name: Sequence[str]) -> str:
    """Return the name without model and dtype."""
    return " ".join(filter(None, name[: len(_SHOWN)]))


def _milliseconds(ms: float | None) -> str:
    if ms is None:
        return "none"
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.2f} ms"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="idefics2 bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A.json", help="results before")
    add("b", type=Path, metavar="B.json", help="results after")
    add(
        "--threshold",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="slower by more than this, and than the spread, gives exit code 1 "
        "(default: %(default)g)",
    )
    add(
        "--spread",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="spread on each side of a row that has none (default: %(default)g)",
    )
    add("--all", action="store_true", help="list rows that are the same, too")
    add("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
