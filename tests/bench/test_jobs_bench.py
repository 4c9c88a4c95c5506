"""``idefics2 bench jobs`` with few rows, on the demo checkpoint and on a stand-in."""

import json
from pathlib import Path

import pytest

from bench_command import bench
from idefics2_bench import machine
from idefics2_bench.jobs import several_gpus
from idefics2_bench.jobs.apart import run_apart
from idefics2_bench.jobs.first_row import first_row
from idefics2_bench.jobs.journal_cost import journal_cost
from idefics2_bench.jobs.parent_cost import parent_cost
from idefics2_bench.jobs.rows_on_disk import write_rows
from idefics2_bench.jobs.stand_in import read_input, write_input
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor

pytestmark = pytest.mark.usefixtures("own_arguments")


@pytest.fixture(autouse=True)
def _no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes seconds
    monkeypatch.setattr(machine, "loop_seconds", lambda: 0.5)


@pytest.mark.long
def test_runs_answer_the_rows_of_iterate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = ["--case", "run-5", "--case", "run-5-one-thread"]
    options = ["--shrink", "16", "--rounds", "2", "--folder", str(tmp_path)]
    about, rows = bench(tmp_path / "out.json", "jobs", *cases, *options)
    run, iterate, one = rows
    assert [row["case"] for row in rows] == [
        "run-5-shrink16",
        "run-5-shrink16",
        "run-5-one-thread-shrink16",
    ]
    assert [row["impl"] for row in rows] == ["reference", "iterate", "reference"]
    for row in rows:
        assert (row["kernel"], row["model"], row["requests"]) == ("jobs", "demo", 5)
        # The same rows, computed anew by each job
        for name in ("prompt_tokens", "new_tokens", "encoded_tiles"):
            assert row[name] == run[name] > 0
        assert (row["cached_tokens"], row["cached_tiles"]) == (0, 0)
        assert row["requests_per_s"] == pytest.approx(5e3 / row["ms"])
        assert row["loop_seconds"] == about["loop_seconds"] == 0.5
    assert len(run["rounds_ms"]) == len(iterate["rounds_ms"]) == 2
    assert (run["peer"], run["peer_ms"]) == ("iterate", iterate["ms"])
    assert run["speedup"] == pytest.approx(iterate["ms"] / run["ms"])
    assert set(run["waits"]) == {"reader_for_window", "engine_for_rows", "writer_for_answers"}
    assert 0 <= run["starved_share"] <= 1
    # Journal and output
    assert run["syncs"] >= 2
    assert one["says_starved"] == (one["advice"] is not None)
    assert "engine's thread, s: plan" in capsys.readouterr().out
    assert not list(tmp_path.glob("idefics2-jobs-*"))


def test_rows_on_disk_are_those_of_the_workload(tmp_path: Path) -> None:
    processor = Processor.load(DEMO_MODEL, ModelConfig.load(DEMO_MODEL), False)
    written = write_rows(tmp_path / "rows", processor, 9, 8)
    rows = list(written.input().rows())
    assert [row.error for row in rows] == [None] * 9
    assert [row.id for row in rows] == list(range(9))
    # Every eighth row has two images
    assert len(list(written.folder.glob("*.jpg"))) == 10
    params = [row.sampling_params for row in rows]
    assert all(one is not None and one.ignore_eos for one in params)
    assert sum(one.max_tokens or 0 for one in params if one is not None) == written.new_tokens


def test_cost_of_the_journal_is_beside_a_job_without_one(tmp_path: Path) -> None:
    ours, other = journal_cost(tmp_path, 40, rounds=3)
    assert [row["impl"] for row in (ours, other)] == ["journal", "no-journal"]
    assert ours["rows"] == other["rows"] == 40
    assert ours["peer_ms"] == other["ms"]
    assert ours["lost_share"] == pytest.approx(1 - other["ms"] / ours["ms"])
    assert ours["busy_share"] == pytest.approx(5000 * ours["journal_us_per_row"] / 1e6)
    more = ours["full_speed_cpu_seconds"] - other["full_speed_cpu_seconds"]
    assert ours["journal_cpu_us_per_row"] == pytest.approx(1e6 * more / 40)
    assert other["journal_us_per_row"] == 0
    assert ours["syncs"] > other["syncs"]
    for folder in ("journal-0", "no-journal-2"):
        # The same answers
        assert len((tmp_path / folder / "fast.jsonl").read_bytes().splitlines()) == 40
    assert list(tmp_path.glob("journal-0/*.job/journal-*"))
    assert not list(tmp_path.glob("no-journal-0/*.job/journal-*"))


def test_cases_of_processes_of_their_own(tmp_path: Path) -> None:
    names = ["resume-30", "plan-20-headers", "check-20"]
    cases = [part for name in names for part in ("--case", name)]
    _, rows = bench(tmp_path / "out.json", "jobs", *cases)
    assert [row["case"] for row in rows] == names
    resume, *others = rows
    assert (resume["rows"], resume["num_computed"]) == (30, 1)
    assert 0 < resume["input_seconds"] < resume["ms"] / 1e3
    for row in others:
        assert (row["rows"], row["image_files"], row["fewer_rows"]) == (20, 20, 2)
        assert row["rows_per_s"] == pytest.approx(20e3 / row["ms"])
        assert row["cpu_seconds"] > 0


def test_input_of_stand_in_rows_is_good(tmp_path: Path) -> None:
    write_input(tmp_path, 7)
    rows = list(read_input(tmp_path, 5).rows())
    assert [(row.id, row.error) for row in rows] == [(f"row {n}", None) for n in range(5)]


@pytest.mark.long
def test_first_row_is_that_of_the_command(tmp_path: Path) -> None:
    row = first_row(tmp_path / "first", rounds=1, count=2)
    assert (row["model"], row["rows"]) == ("demo", 2)
    assert row["rounds_ms"] == [row["ms"]]
    # A warming run and the timed one, both complete
    for turn in (0, 1):
        answers = (tmp_path / f"first/out-{turn}.jsonl").read_text().splitlines()
        assert [json.loads(line)["error"] for line in answers] == [None] * 2


def test_a_program_that_fails_is_an_error() -> None:
    with pytest.raises(Idefics2Error, match=r"must end with \(0,\), got 2: .*no-such-file"):
        run_apart("idefics2_engine", ["plan", "-i", "no-such-file"])


@pytest.mark.parametrize(
    "case", ["run", "run-0", "run-5-headers", "plan-5-one-thread", "first-row-3", "walk-5"]
)
def test_unknown_cases_are_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "jobs", "--case", case]) == 2
    assert (
        f"--case must be one of --help, such as run-2000, got '{case}'" in capsys.readouterr().err
    )


def test_the_parent_of_workers_is_measured(tmp_path: Path) -> None:
    figures = parent_cost(tmp_path, 40, workers=2)
    assert (figures["rows"], figures["workers"]) == (40, 2)
    assert figures["rows_per_s"] == pytest.approx(4e4 / figures["ms"])
    assert figures["parent_cpu_us_per_row"] > 0


@pytest.mark.long
def test_several_workers_answer_all_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--rows", "80", "--shrink", "16", "--folder", str(tmp_path)]
    options += ["--kind", "workers", "--kind", "killed", "--json", str(out)]
    assert several_gpus.main(options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["workers-80-x1", "workers-80-x2", "killed-80-x2"]
    for row in rows:
        assert sum(row["rows_of_worker"].values()) == 80
        assert row["new_tokens"] == rows[0]["new_tokens"]
        assert row["requests_per_s"] == pytest.approx(8e4 / row["ms"])
