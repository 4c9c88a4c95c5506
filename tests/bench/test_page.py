"""The page of results files: its charts have the right numbers, and it needs nothing else."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from idefics2_bench.results.page import page_of, write_report
from idefics2_bench.results.result_charts import charts_of
from idefics2_bench.results.results_file import ResultsFile, Row, read_results
from idefics2_engine.charts.drawing import Chart, svg_file
from idefics2_engine.charts.plot import Plot
from idefics2_engine.charts.row_chart import RowChart
from idefics2_engine.cli.command import run
from idefics2_engine.report_page import render_page
from page_check import check_page
from paths import ROOT

RESULTS = sorted((ROOT / "bench/results").glob("*.json"))
EVIL = "<img src=x onerror=alert(1)>"
GPU = {"gpu": "a GPU", "copy_TBps": 2.0, "matmul_TFLOPs": 400.0}


def kernel_row(case: str, impl: str, tflops: float, gbps: float, **fields: object) -> Row:
    return {
        **{"kernel": "linear", "case": case, "impl": impl, "ms": 1.0},
        **{"TFLOPs": tflops, "GBps": gbps, "roofline": 0.5},
        **fields,
    }


BESIDE = {"peer": "cublas", "peer_ms": 2.0, "speedup": 2.0}
KERNELS = [
    kernel_row("fast", "triton", 200.0, 1000.0, **BESIDE),
    kernel_row("fast", "tiled", 50.0, 250.0, **BESIDE),
    kernel_row("fast", "cublas", 100.0, 500.0),
    kernel_row("fast", "slower-peer", 10.0, 50.0),
]


def chart(name: str, *files: ResultsFile) -> Chart:
    return {named.name: named.chart for named in charts_of(files)}[name]


def step(case: str, impl: str, batch: int, ms: float, **fields: object) -> Row:
    return {
        **{"kernel": "step", "case": case, "impl": impl, "batch": batch, "ms": ms},
        **{"text_tokens": 0, "new_tokens": batch, "model": "m", "dtype": "bfloat16"},
        **fields,
    }


def test_roofline_has_our_kernel_its_best_peer_and_the_ceilings() -> None:
    plot = chart("roofline", ResultsFile("f", GPU, KERNELS))
    assert isinstance(plot, Plot)
    ceiling, peer, ours = plot.series
    assert ceiling.mark is None
    # 400 TFLOP/s over 2 TB/s is 200 FLOP a byte
    assert (ceiling.points[1].x, ceiling.points[1].y) == (200.0, 400.0)
    assert ceiling.points[-1].y == 400.0
    assert ceiling.points[0].y == pytest.approx(2.0 * ceiling.points[0].x)
    assert [(p.x, p.y) for p in ours.points] == [(200.0, 200.0)]
    assert [(p.x, p.y) for p in peer.points] == [(200.0, 100.0)]
    assert ours.mark is not None
    assert peer.mark is not None
    assert (ours.mark.is_hollow, peer.mark.is_hollow) == (False, True)
    assert "measured: 2 TB/s, 400 TFLOP/s" in plot.draw(640).svg()


def test_own_kernel_is_a_diamond_beside_ours() -> None:
    mine = kernel_row("fast", "mine", 20.0, 100.0, peer="cublas", peer_ms=2.0, speedup=0.2)
    file = ResultsFile("f", GPU, [mine, *KERNELS])
    plot, ratios = chart("roofline", file), chart("kernels-beside-peers", file)
    assert isinstance(plot, Plot)
    assert isinstance(ratios, RowChart)
    assert plot.series[-1].mark is not None
    assert plot.series[-1].mark.shape == "diamond"
    assert [(dot.value, dot.mark.shape) for dot in ratios.rows[0].dots] == [
        (0.2, "diamond"),
        (2.0, "circle"),
    ]
    assert ratios.draw(640).svg().count(">mine<") == 1


def test_ratios_are_those_of_the_rows() -> None:
    files = read_results([ROOT / "bench/results/h200-kernels.json"])
    ratios = chart("kernels-beside-peers", *files)
    assert isinstance(ratios, RowChart)
    (row,) = [row for row in ratios.rows if row.label == "nf4_matmul"]
    expected = [
        row["speedup"]
        for row in files[0].rows
        if (row["kernel"], row["impl"]) == ("nf4_matmul", "triton") and "speedup" in row
    ]
    assert len(expected) == 22
    assert [dot.value for dot in row.dots] == expected
    content = svg_file(ratios).decode()
    assert len(re.findall(r"<title>", content)) == sum(len(row.dots) for row in ratios.rows)


def test_decode_step_has_a_line_for_each_precision_and_peer() -> None:
    rows = [
        *(step("decode-b32", "triton", 32, 5.0), step("decode-b1", "triton", 1, 4.0)),
        step("decode-b1-nf4", "triton", 1, 2.0),
        *(
            step("decode-b1", "transformers", 1, 20.0),
            step("decode-b1", "transformers-compiled", 1, 6.0),
        ),
    ]
    files = [ResultsFile("f", {}, rows)]
    times, tokens = chart("decode-step", *files), chart("decode-tokens", *files)
    assert isinstance(times, Plot)
    assert isinstance(tokens, Plot)
    lines = {
        (s.mark.shape, s.mark.is_hollow): [(p.x, p.y) for p in s.points]
        for s in times.series
        if s.mark
    }
    assert lines == {
        ("circle", False): [(1, 4.0), (32, 5.0)],
        ("square", False): [(1, 2.0)],
        ("circle", True): [(1, 20.0)],
        ("diamond", True): [(1, 6.0)],
    }
    assert tokens.series[-2].points[-1].y == pytest.approx(32 / 5e-3)
    assert times.x.ticks == (1, 32)


def test_context_and_batch_are_apart() -> None:
    rows = [
        *(step(f"decode-b{n}", "triton", n, 4.0, context=200) for n in (1, 8)),
        *(step(f"decode-b8-s{n}", "triton", 8, n / 100, context=n) for n in (400, 800)),
    ]
    file = ResultsFile("f", {}, rows)
    batches, contexts = chart("decode-step", file), chart("decode-context", file)
    assert isinstance(batches, Plot)
    assert isinstance(contexts, Plot)
    assert [[p.x for p in s.points] for s in batches.series] == [[1, 8]]
    assert [[(p.x, p.y) for p in s.points] for s in contexts.series] == [
        [(200, 2000), (400, 2000), (800, 1000)]
    ]


def test_image_throughput_is_by_the_size_of_an_image() -> None:
    rows = [
        {**step(f"image-{side}-b8", "triton", 8, ms), "kernel": "image", "images": 8, "patches": n}
        for side, n, ms in ((224, 2048, 4.0), (448, 8192, 16.0))
    ]
    mixed = {**rows[0], "case": "image-mixed-b8", "patches": 9000}
    plot = chart("image-size", ResultsFile("f", {}, [*rows, mixed]))
    assert isinstance(plot, Plot)
    assert [(p.x, p.y) for s in plot.series for p in s.points] == [(256, 2000), (1024, 500)]


def test_offline_time_is_that_of_a_request() -> None:
    seconds = {"decode": 1.0, "text": 0.0, "image": 2.0, "idle": 0.5}
    job = {
        **{"kernel": "offline", "case": "vqa-10", "impl": "triton", "ms": 3500.0, "requests": 10},
        **{"model": "m", "device_seconds": seconds},
    }
    bars = chart("offline-time", ResultsFile("f", {}, [job]))
    assert isinstance(bars, RowChart)
    (row,) = bars.rows
    assert [bar.value for bar in row.bars] == [100.0, 200.0, 50.0]
    assert row.remark == "2.857 requests/s"
    assert [bar.color for bar in row.bars] == [0, 2, None]


def test_memory_of_cases_that_are_the_same_is_one_row() -> None:
    memory = {"weights_GB": 4.0, "allocated_GB": 5.0}
    rows = [step(f"decode-b{n}", "triton", n, 1.0, **memory) for n in (1, 2, 4)]
    job = {
        **{"kernel": "offline", "case": "vqa-10", "impl": "triton", "ms": 1.0, "model": "m"},
        **{"weights_GB": 4.0, "kv_cache_GB": 10.0, "other_GB": 2.0},
    }
    bars = chart("memory", ResultsFile("f", {}, [*rows, job]))
    assert isinstance(bars, RowChart)
    assert [(row.label, row.remark) for row in bars.rows] == [
        ("decode-b1 and 2 more", "5 GB"),
        ("vqa-10", "16 GB"),
    ]
    assert [[bar.value for bar in row.bars] for row in bars.rows] == [[4, 1], [4, 10, 2]]


def test_files_in_one_chart_have_different_colors_in_all() -> None:
    files = [
        ResultsFile(name, {}, [step(f"decode-b{n}", "triton", n, 4.0, **BESIDE) for n in (1, 8)])
        for name in "abcdef"
    ]
    ratios = chart("model-beside-peers", *files)
    assert isinstance(ratios, RowChart)
    colors = [dot.mark.color for dot in ratios.rows[0].dots]
    assert len(set(colors)) == 6
    plot = chart("decode-step", *files)
    assert isinstance(plot, Plot)
    assert [s.mark.color for s in plot.series if s.mark] == colors


def test_page_of_all_recorded_results_needs_nothing_else(tmp_path: Path) -> None:
    page, folder = tmp_path / "report.html", tmp_path / "charts"
    files = map(str, RESULTS)
    assert run(["bench", "report", *files, "-o", str(page), "--svg", str(folder)]) == 0
    content = page.read_text(encoding="utf-8")
    for path in RESULTS:
        assert path.stem in content
    check_page(content)
    assert "<img" not in content
    charts = {path.stem for path in folder.iterdir()}
    steps = {path for path in charts if path.startswith("step-")}
    assert charts - steps == {
        *("roofline-1", "roofline-2", "roofline-3", "kernels-beside-peers", "model-beside-peers"),
        *("decode-step", "decode-tokens", "decode-context", "prefill-tokens", "image-size"),
        *("steps", "offline-time", "memory"),
    }
    assert {"step-decode-b1", "step-prefill-4096-nf4", "step-image-980-b8"} <= steps
    for path in folder.iterdir():
        root = ElementTree.fromstring(path.read_bytes())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert path.stat().st_size < 64_000
    assert content.count("<svg") == 2 * len(charts)


def test_charts_of_the_docs_are_those_of_the_recorded_results(tmp_path: Path) -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.+?\]\(charts/(.+?)\)", page)
    (command,) = re.findall(
        r"^\$ idefics2 (bench report .+ --svg) docs/charts$", page, re.MULTILINE
    )
    words = command.replace("bench/results", str(ROOT / "bench/results")).split()
    words[words.index("-o") + 1] = str(tmp_path / "report.html")
    assert run([*words, str(tmp_path / "charts")]) == 0
    there = {path.name: path.read_bytes() for path in (ROOT / "docs/charts").iterdir()}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "charts").iterdir()}
    assert sorted(shown) == sorted(there)


def test_texts_of_files_are_escaped() -> None:
    rows = [{**row, "kernel": EVIL, "case": EVIL} for row in KERNELS]
    rows += [{**step(EVIL, EVIL, 1, 4.0, weights_GB=1.0)}]
    content = render_page(page_of([ResultsFile(EVIL, {**GPU, "gpu": EVIL, "commit": EVIL}, rows)]))
    assert b"<img" not in content
    assert content.count(b"&lt;img src=x") > 5


def test_wrong_kernels_and_failed_cases_are_marked() -> None:
    wrong = {"kernel": "linear", "case": "wrong", "impl": "triton", "error": 3.0}
    failed = {"kernel": "step", "case": "decode-b1", "impl": "triton", "error": "oom", "model": "m"}
    page = page_of([ResultsFile("f", GPU, [*KERNELS, wrong, failed])])
    assert [figure.value for figure in page.figures if figure.is_bad] == ["2"]
    assert "At least as fast as the fastest peer" in [figure.label for figure in page.figures]
    bad = {table.heading: [row for row in table.rows if row.is_bad] for table in page.tables}
    assert {heading: len(rows) for heading, rows in bad.items()} == {
        **{"Files": 0, "Kernels": 1, "The whole model": 1}
    }


def test_report_of_a_suite_is_written_if_it_is_wanted(tmp_path: Path) -> None:
    write_report(None, GPU, KERNELS)
    path = tmp_path / "h200.html"
    write_report(path, GPU, KERNELS)
    assert "Roofline, a GPU" in path.read_text(encoding="utf-8")


def test_page_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "report", str(RESULTS[0]), "-o", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    there = str(tmp_path / "none" / "page.html")
    assert run(["bench", "latency", "--report", there]) == 2
    assert "must be in a folder that exists" in capsys.readouterr().err
