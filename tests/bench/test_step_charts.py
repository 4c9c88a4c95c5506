"""Rows of steps in comparisons, in charts and in the table of the page."""

from pathlib import Path
from typing import Any

import pytest

from idefics2_bench.results.compare import compare
from idefics2_bench.results.page import page_of
from idefics2_bench.results.result_charts import charts_of
from idefics2_bench.results.results_file import ResultsFile, Row, read_results
from idefics2_bench.steps.parts import OTHER, WHOLE
from idefics2_engine.charts.row_chart import RowChart
from idefics2_engine.errors import ConfigError


def part(operation: str, ms: float, **fields: Any) -> Row:
    head = {"kernel": "steps", "case": "decode-b1", "impl": "triton", "operation": operation}
    return {**head, "ms": ms, "ms_p20": ms, "ms_p80": ms, "model": "m", **fields}


STEP = [
    part(WHOLE, 10.0, traced_ms=11.0, floor_ms=8.0, launches=9),
    part("linear 8x4", 8.0, calls=32, bytes=8, flops=8, floor_ms=6.0),
    part("paged_attention 2x2", 2.95, calls=32, bytes=8, flops=8, floor_ms=2.0),
    part(OTHER, 0.05),
]


def test_slower_part_is_shown_but_only_a_slower_step_counts() -> None:
    slower = [STEP[0], part("linear 8x4", 9.0), *STEP[2:]]
    found = compare(ResultsFile("a", {}, STEP), ResultsFile("b", {}, slower), 0.05)
    assert [change.verdict for change in found.ours] == ["slower", "same", "same", "same"]
    assert found.ours[0].name == "steps decode-b1 triton linear 8x4"
    assert found.regressions(0.05) == []
    slower[0] = part(WHOLE, 12.0)
    found = compare(ResultsFile("a", {}, STEP), ResultsFile("b", {}, slower), 0.05)
    assert [change.name for change in found.regressions(0.05)] == [
        "steps decode-b1 triton whole step"
    ]


def test_charts_of_a_step_show_its_parts_and_floors() -> None:
    files = [ResultsFile("f", {}, STEP)]
    charts = {named.name: named.chart for named in charts_of(files)}
    assert list(charts) == ["steps", "step-decode-b1"]
    every, one = charts["steps"], charts["step-decode-b1"]
    assert isinstance(every, RowChart)
    assert isinstance(one, RowChart)
    (row,) = every.rows
    assert [bar.value for bar in row.bars] == pytest.approx([800 / 11, 295 / 11, 5 / 11])
    assert [dot.value for dot in row.dots] == [80]
    assert row.remark == "10 ms, 1.25 x floor"
    assert [row.label for row in one.rows] == ["linear 8x4", "paged_attention 2x2", "1 more"]
    assert [dot.value for dot in one.rows[0].dots] == [6.0]
    assert one.rows[0].remark == "73%, 1.33 x floor"
    (table,) = [table for table in page_of(files).tables if table.heading == "Parts of steps"]
    assert len(table.rows) == 3


def test_names_of_charts_are_names_of_files() -> None:
    rows = [{**row, "case": "../decode b1"} for row in STEP]
    files = [ResultsFile("f", {}, rows), ResultsFile("g", {}, rows)]
    assert [named.name for named in charts_of(files)] == [
        *("steps", "step--decode-b1", "step--decode-b1-2")
    ]


def test_part_without_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"machine": {}, "rows": [{"kernel": "steps", "case": "c", "impl": "i"}]}')
    with pytest.raises(ConfigError, match="row 0 must have a text as 'operation'"):
        read_results([path])
