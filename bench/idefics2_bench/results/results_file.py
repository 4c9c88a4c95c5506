"""Reading results files of ``idefics2 bench``, and telling our rows from those of peers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from idefics2_bench.steps.parts import KERNEL as STEPS
from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.plan.device_rates import PEER
from idefics2_engine.json_file import read_json
from idefics2_engine.model_files import printable_path

Row = dict[str, Any]

_NAMES = ("kernel", "case", "impl")
# The fields that give the two ends of a row's spread, in milliseconds
_ENDS = (("ms_p20", "ms_p80"), ("ms_min", "ms_max"))

# Figures of a part of a step
_PART = ("calls", "bytes", "flops", "floor_ms")


@dataclass(frozen=True)
class ResultsFile:
    """The rows of one file.

    Attributes:
        name: What the file is called where several are shown: its name, with its folder's if two
            files have the same.
        machine: GPU, versions, commit, date and measured rates.
        rows: Rows with at least ``kernel``, ``case`` and ``impl``.
    """

    name: str
    machine: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def timed(self) -> list[Row]:
        """Rows that have a time."""
        return [row for row in self.rows if "ms" in row]

    def is_peer(self, row: Row) -> bool:
        """Return whether ``row`` is of a peer. Only our rows name the peer that they are beside."""
        if row["impl"].startswith(PEER):
            return True
        return row["impl"] in self._beside.get((row["kernel"], row["case"]), ())

    @cached_property
    def _beside(self) -> dict[tuple[str, str], set[str]]:
        """Names of rows without a peer, by case, where another row has one."""
        cases: dict[tuple[str, str], list[Row]] = {}
        for row in self.timed:
            cases.setdefault((row["kernel"], row["case"]), []).append(row)
        return {
            case: {row["impl"] for row in own if "peer" not in row}
            for case, own in cases.items()
            if any("peer" in row for row in own)
        }


def read_results(paths: Sequence[Path]) -> list[ResultsFile]:
    """Read results files and name each so that no two have the same name.

    Raises:
        ConfigError: A file cannot be read or is no results file, or is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("results files must be different, got one twice")
    stems = Counter(path.stem for path in paths)
    names = [
        path.stem if stems[path.stem] == 1 else f"{path.resolve().parent.name}/{path.stem}"
        for path in paths
    ]
    if len(set(names)) < len(names):
        names = [str(path.with_suffix("")) for path in paths]
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def spread(row: Row) -> tuple[float, float] | None:
    """Return the ends of a row's spread in milliseconds, or ``None`` if it has none.

    They are the 20th and the 80th percentile, or the fastest and the slowest round.
    """
    for low, high in _ENDS:
        if low in row and high in row:
            return row[low], row[high]
    rounds = row.get("rounds_ms", ())
    return (min(rounds), max(rounds)) if len(rounds) > 1 else None


def _read(path: Path, name: str) -> ResultsFile:
    content = read_json(path)
    machine, rows = content.get("machine"), content.get("rows")
    if not isinstance(machine, dict) or not isinstance(rows, list):
        raise ConfigError(
            f"{printable_path(path)}: must be a file that idefics2 bench wrote, with 'machine' and "
            f"'rows'"
        )
    for number, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise ConfigError(f"{printable_path(path)}: row {number} must have {problem}")
    return ResultsFile(name, machine, rows)


def _problem(row: object) -> str:
    """Return what a row must have and has not, or an empty text."""
    if not isinstance(row, dict):
        return "the form of an object"
    for key in _NAMES:
        if not isinstance(row.get(key), str):
            return f"a text as {key!r}"
    if row["kernel"] == STEPS and not isinstance(row.get("operation"), str):
        return "a text as 'operation'"
    rounds = row.get("rounds_ms", [])
    if not isinstance(rounds, list):
        return "a list as 'rounds_ms'"
    keys = ("ms", *_ENDS[0], *_ENDS[1], "speedup", "peer_ms", *_PART)
    numbers = [(key, row[key]) for key in keys if key in row]
    numbers += [("rounds_ms", each) for each in rounds]
    for key, value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"a number as {key!r}"
        if not isfinite(value) or value <= 0:
            return f"a positive number as {key!r}"
    return ""
