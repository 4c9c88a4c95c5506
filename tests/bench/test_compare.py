"""``idefics2 bench compare``: what is beyond the spread, peers apart, and the exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_bench.results.compare import compare
from idefics2_bench.results.results_file import ResultsFile
from idefics2_engine.cli.command import run

Row = dict[str, Any]


def row(case: str, ms: float, spread: float = 0.0, **fields: Any) -> Row:
    ends = {"ms_p20": ms - spread, "ms_p80": ms + spread} if spread else {}
    return {"kernel": "k", "case": case, "impl": "triton", "ms": ms, **ends, **fields}


def results(tmp_path: Path, name: str, *rows: Row, **machine: str) -> str:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows}))
    return str(path)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (row("c", 10, 0.5), row("c", 11.1, 0.5), "slower"),
        (row("c", 10, 0.5), row("c", 10.9, 0.5), "same"),
        (row("c", 10, 0.5), row("c", 8.9, 0.5), "faster"),
        # A small difference beyond the spread, and a large one within
        (row("c", 10, 0.01), row("c", 10.05, 0.01), "slower"),
        (row("c", 10, 4), row("c", 15, 4), "same"),
        (row("c", 10, rounds_ms=[9, 10, 12]), row("c", 12, rounds_ms=[11.9, 12, 13]), "same"),
        (row("c", 10, rounds_ms=[9, 10, 11]), row("c", 12, rounds_ms=[11.9, 12, 13]), "slower"),
        # Without a spread it is 5 % on each side
        (row("c", 10), row("c", 10.9), "same"),
        (row("c", 10), row("c", 11.2), "slower"),
        (row("c", 10), {"kernel": "k", "case": "c", "impl": "triton", "error": 3.0}, "lost"),
    ],
)
def test_verdict_is_by_the_spread(a: Row, b: Row, verdict: str) -> None:
    found = compare(ResultsFile("a", {}, [a]), ResultsFile("b", {}, [b]), 0.05)
    (change,) = found.changes
    assert change.verdict == verdict
    assert change.ratio == (None if verdict == "lost" else pytest.approx(b["ms"] / a["ms"]))


def test_peers_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside: Row = {"peer": "cublas", "peer_ms": 2.0, "speedup": 2.0}
    a = results(tmp_path, "a", row("c", 1, **beside), row("c", 2, impl="cublas"))
    b = results(tmp_path, "b", row("c", 1, **beside), row("c", 4, impl="cublas"))
    assert run(["bench", "compare", a, b]) == 0
    assert "peers: 2.000 times as long (median of 1 rows)" in capsys.readouterr().out


def test_exit_code_is_by_the_threshold(tmp_path: Path) -> None:
    a = results(tmp_path, "a", row("c", 100, 0.1), row("d", 100, 0.1))
    b = results(tmp_path, "b", row("c", 103, 0.1), row("d", 50, 0.1))
    assert run(["bench", "compare", a, b]) == 0
    assert run(["bench", "compare", a, b, "--threshold", "2"]) == 1
    assert run(["bench", "compare", a, b, "--threshold", "2", "--json"]) == 1
    # Within the spread no threshold counts
    noisy = results(tmp_path, "noisy", row("c", 103, 5), row("d", 103, 5))
    assert run(["bench", "compare", a, noisy, "--threshold", "0"]) == 0


def test_lost_row_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = results(tmp_path, "a", row("c", 1), row("d", 1))
    b = results(tmp_path, "b", row("c", 1), {**row("d", 1), "ms": None, "error": 9.0})
    broken = json.loads(Path(b).read_text())
    del broken["rows"][1]["ms"]
    Path(b).write_text(json.dumps(broken))
    assert run(["bench", "compare", a, b]) == 1
    out = capsys.readouterr().out
    assert "k d triton" in out
    assert "1 lost" in out


def test_table_lists_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = results(
        tmp_path, "a", row("slow", 1, 0.01), row("same", 1, 0.01), row("old", 1), gpu="H100"
    )
    b = results(
        tmp_path, "b", row("slow", 2, 0.01), row("same", 1, 0.01), row("new", 1), gpu="H200"
    )
    assert run(["bench", "compare", a, b]) == 1
    out = capsys.readouterr().out
    assert out.startswith("gpu: H100 and H200")
    assert "k slow triton" in out
    assert "1.00 ms  2.00 ms  2.000  slower" in out
    assert "k same" not in out
    assert "beyond the spread: 1 slower, 0 faster; 1 the same" in out
    assert "only in a: 1 rows, such as k old triton" in out
    assert "only in b: 1 rows, such as k new triton" in out
    assert run(["bench", "compare", a, b, "--all"]) == 1
    assert "k same triton" in capsys.readouterr().out


def test_json_has_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = results(tmp_path, "a", row("c", 100, 0.1), row("d", 1), commit="1")
    b = results(tmp_path, "b", row("c", 120, 0.1), row("d", 1), commit="2")
    assert run(["bench", "compare", a, b, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["verdict"] for each in found["rows"]] == ["slower", "same"]
    assert found["rows"][0]["ratio"] == pytest.approx(1.2)
    assert found["regressions"] == ["k c triton"]
    assert found["peers_ratio"] is None
    # Commits are what is compared
    assert found["machines"] == {}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row("d", 1)], [], "must have timed rows in common, got none"),
        ([row("c", 1, model="another")], [], "must have timed rows in common, got none"),
        ([row("c", 1)], ["--threshold", "-1"], "--threshold must be 0 to 100"),
    ],
)
def test_files_without_common_rows_and_bad_options_are_refused(
    rows: list[Row],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = results(tmp_path, "a", row("c", 1)), results(tmp_path, "b", *rows)
    assert run(["bench", "compare", a, b, *options]) == 2
    assert message in capsys.readouterr().err
