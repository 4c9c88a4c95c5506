"""Results files: names, peers, spreads, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_bench.results.results_file import ResultsFile, read_results, spread
from idefics2_engine.errors import ConfigError
from paths import ROOT

RESULTS = sorted((ROOT / "bench/results").glob("*.json"))
ROW = {"kernel": "k", "case": "c", "impl": "triton", "ms": 1.0}


def written(path: Path, *rows: Any, machine: Any = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine or {}, "rows": rows}))
    return path


def test_recorded_results_are_read() -> None:
    files = read_results(RESULTS)
    assert [file.name for file in files] == [path.stem for path in RESULTS]
    assert all(file.timed for file in files)


def test_peers_are_told_from_our_rows() -> None:
    (file,) = read_results([ROOT / "bench/results/h200-kernels.json"])
    peers = {row["impl"] for row in file.rows if file.is_peer(row)}
    assert peers == {
        *("torch", "torch-flash2", "torch-cudnn", "torch-flex", "torch-sort"),
        *("cublas", "bitsandbytes"),
    }
    ours = {row["impl"] for row in file.rows if not file.is_peer(row)}
    assert not ours & peers
    assert "triton" in ours


def test_peer_that_failed_is_a_peer() -> None:
    failed = {**ROW, "impl": "transformers-compiled", "error": "no compiler"}
    file = ResultsFile("f", {}, [ROW, failed])
    assert [file.is_peer(row) for row in file.rows] == [False, True]


def test_files_of_one_name_have_the_name_of_their_folder(tmp_path: Path) -> None:
    paths = [written(tmp_path / folder / "h200.json", ROW) for folder in ("before", "after")]
    paths.append(written(tmp_path / "h100.json", ROW))
    assert [file.name for file in read_results(paths)] == ["before/h200", "after/h200", "h100"]


@pytest.mark.parametrize(
    ("row", "ends"),
    [
        ({"ms": 2.0, "ms_p20": 1.5, "ms_p80": 2.5}, (1.5, 2.5)),
        ({"ms": 2.0, "ms_min": 1.0, "ms_max": 3.0}, (1.0, 3.0)),
        ({"ms": 2.0, "rounds_ms": [2.2, 2.0, 1.9]}, (1.9, 2.2)),
        ({"ms": 2.0, "rounds_ms": [2.0]}, None),
        ({"ms": 2.0}, None),
    ],
)
def test_spread_is_that_of_percentiles_or_rounds(
    row: dict[str, Any], ends: tuple[float, float] | None
) -> None:
    assert spread(row) == ends


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "the form of an object"),
        ({**ROW, "case": 3}, "a text as 'case'"),
        ({**ROW, "ms": "fast"}, "a number as 'ms'"),
        ({**ROW, "ms": True}, "a number as 'ms'"),
        ({**ROW, "ms": 0}, "a positive number as 'ms'"),
        ({**ROW, "ms": float("nan")}, "a positive number as 'ms'"),
        ({**ROW, "speedup": -1.0}, "a positive number as 'speedup'"),
        ({**ROW, "rounds_ms": 3}, "a list as 'rounds_ms'"),
        ({**ROW, "rounds_ms": [1.0, -1.0, 1.0]}, "a positive number as 'rounds_ms'"),
    ],
)
def test_bad_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.json", ROW, row)
    with pytest.raises(ConfigError, match=f"bad.json: row 1 must have {message}"):
        read_results([path])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"h200\.json"):
        read_results([tmp_path / "h200.json"])
    path = tmp_path / "config.json"
    path.write_text('{"rows": {}}')
    with pytest.raises(ConfigError, match="must be a file that idefics2 bench wrote"):
        read_results([path])
    path = written(tmp_path / "once.json", ROW)
    with pytest.raises(ConfigError, match="got one twice"):
        read_results([path, path])
