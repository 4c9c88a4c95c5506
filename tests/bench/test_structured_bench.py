"""``idefics2 bench structured`` on a tiny checkpoint."""

from pathlib import Path

import pytest

from bench_command import bench
from idefics2_engine.cli.main import main

pytest.importorskip("llguidance")


@pytest.mark.long
def test_steps_and_whole_answers(tmp_path: Path) -> None:
    _, rows = bench(tmp_path / "out.json", "structured", "--batch", "2", "--rounds", "1")
    free, constrained, forced = rows
    assert [row["case"] for row in rows] == ["steps-b2", "steps-b2", "forced-b2"]
    assert [row["impl"] for row in rows] == ["free", "constrained", "constrained"]
    assert (constrained["peer"], constrained["peer_ms"]) == ("free", free["ms"])
    # The answer is the same one by one, in more forward passes
    assert forced["forward_passes_one_by_one"] > 1.5 * forced["forward_passes"]
    assert forced["tokens_per_pass"] > 1.5
    assert 0 < forced["forced_share"] < 1


@pytest.mark.parametrize("option", ["--rounds", "--batch"])
def test_numbers_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "structured", "--device", "cpu", option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
