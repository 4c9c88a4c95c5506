"""``idefics2 run --shadow``: what the command says, and what its files have."""

import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.jobs.shadow import shadow_rows
from paths import ROOT


def run(out: Path, *options: str) -> int:
    source = ROOT / "examples/jobs/questions.jsonl"
    files = ["-i", str(source), "-o", str(out), "--media-root", str(DEMO_IMAGES)]
    return main(["run", *files, "--device", "cpu", "--limit", "3", *options])


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.with_name(f"{out.name}.summary.json").read_text())
    return found


def check(out: Path, said: str, rows: int) -> None:
    found = summary(out)
    shadow = found["shadow"]
    assert shadow["rows"] == {"chosen": rows, "compared": rows}
    assert shadow["tokens"] == shadow["greedy"]["tokens"] > 0
    assert shadow["top1_agreement"] == shadow["greedy"]["top1_agreement"] == 1.0
    assert (shadow["largest_kl"], shadow["largest_margin"]) == (0.0, 0.0)
    assert len(shadow["worst"]) == rows
    assert found["run"]["shadow"]["compared"] == rows
    assert found["run"]["shadow"]["seconds"] > 0
    assert f"reference path: {rows} of {rows} chosen rows compared, " in said
    assert shadow["same_operations"]
    assert "on a CPU both are the reference" in said


def test_figures_are_in_the_summary_and_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_rows, "SHARE_OF_TIME", 1e9)
    out, page = tmp_path / "a.jsonl", tmp_path / "a.html"
    assert run(out, "--shadow", "2", "--report", str(page)) == 0
    check(out, capsys.readouterr().out, 2)
    text = page.read_text()
    assert "Compared with the reference path" in text
    assert summary(out)["shadow"]["worst"][0]["id"] in text
    # A run that only shows rows leaves the figures
    before = summary(out)
    assert run(out, "--show", "1") == 0
    assert summary(out) == before
    capsys.readouterr()
    assert run(out, "--shadow", "2") == 0
    assert "--shadow has no effect on a complete job" in capsys.readouterr().out
    assert summary(out) == before
    # The answers do not depend on it
    plain = tmp_path / "b.jsonl"
    assert run(plain) == 0
    assert plain.read_bytes() == out.read_bytes()
    assert "shadow" not in summary(plain)
    assert "shadow" not in summary(plain)["run"]


@pytest.mark.long
def test_workers_compare_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_rows, "SHARE_OF_TIME", 1e9)
    found = []
    for name, workers in (("one", "1"), ("two", "2")):
        out = tmp_path / f"{name}.jsonl"
        assert run(out, "--shadow", "2", "--workers", workers) == 0
        check(out, capsys.readouterr().out, 2)
        found.append([one["id"] for one in summary(out)["shadow"]["worst"]])
    assert found[0] == found[1]


def test_bad_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "a.jsonl", "--shadow", "0") == 2
    assert "--shadow must be 1 to 1000 rows" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
