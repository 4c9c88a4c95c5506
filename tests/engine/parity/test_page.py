"""The page of a comparison: what it shows is where the fault is, and its size is bounded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idefics2_engine.charts.drawing import svg_file
from idefics2_engine.charts.heat_map import HeatMap
from idefics2_engine.charts.picture_map import PictureMap
from idefics2_engine.images import tiling
from idefics2_engine.parity import Case, Comparison, stages, write_heat_maps, write_report
from idefics2_engine.parity.measures.case_pictures import CasePicture, case_pictures
from idefics2_engine.parity.measures.measure import Legs, StageMeasure, measure_stage
from idefics2_engine.parity.measures.row_differences import RowDifferences
from idefics2_engine.parity.measures.worst_cases import MOST_CASES, WorstCase, worst_cases
from idefics2_engine.parity.page.heat_maps import heat_maps
from idefics2_engine.parity.page.report import page_of
from idefics2_engine.parity.recording.case_recording import CaseRecording
from idefics2_engine.parity.recording.dump import Recording, write_digest, write_recording
from idefics2_engine.report_page import render_page
from page_check import check_page
from parity_recordings import CASES, compare_on_cpu, record_path

EVIL = "<img src=https://example.org onerror=alert(1)>"


@pytest.fixture(scope="module")
def clean() -> Comparison:
    return compare_on_cpu("ours:deterministic", "ours:reference", cases=CASES[1:])


@pytest.fixture(scope="module")
def swapped(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Compare A, in which the positions of the patches 3 and 4 of each tile are swapped."""
    right: Callable[[tiling.Tile], Any] = tiling.Tile.position_ids

    def wrong(tile: tiling.Tile) -> Any:
        ids = np.array(right(tile))
        ids[[3, 4]] = ids[[4, 3]]
        return ids

    folder: Path = tmp_path_factory.mktemp("swapped") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling.Tile, "position_ids", wrong)
        record_path("ours:reference", folder)
    return compare_on_cpu(folder, ours)


def figures(comparison: Comparison) -> dict[str, tuple[str, str]]:
    return {figure.label: (figure.value, figure.note) for figure in page_of(comparison).figures}


def charts(comparison: Comparison) -> dict[str, Any]:
    return {named.name: named.chart for named in heat_maps(comparison)}


def test_comparison_keeps_a_number_for_each_row(swapped: Comparison) -> None:
    by_case = {worst.case: worst for worst in swapped.worst_cases}
    assert sorted(by_case) == [0, 1]
    for one in swapped.stages[:-2]:
        found = [by_case[case].differences.get(one.stage, []) for case in by_case]
        parts = [part for own in found for part in own]
        assert sum(map(len, parts)) == one.measure.num_rows
        largest = max(float(part.max()) for part in parts)
        assert largest == pytest.approx(one.measure.largest)
        if "patch" in one.measure.place and largest:
            worst = by_case[one.measure.place["case"]]
            rows = worst.differences[one.stage]
            at_place = []
            for part, own in enumerate(rows):
                for row, value in enumerate(own.tolist()):
                    place = worst.recording.place(one.stage, part, row)
                    if place == {name: one.measure.place[name] for name in place}:
                        at_place.append(value)
            assert at_place == [pytest.approx(largest)]


def test_patches_of_a_fault_are_the_darkest(swapped: Comparison) -> None:
    chart = charts(swapped)["case-0-image-0"]
    assert isinstance(chart, PictureMap)
    shown = [panels[0].label for panels in chart.panels]
    assert (shown[0], shown[-1]) == ("patch embedding", "projection")
    quarters, whole = chart.panels[0]
    assert quarters.is_marked
    assert whole.remark.startswith("whole, ")
    (overlay,) = whole.overlays
    rows, columns = np.nonzero(overlay.values > 0.01)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (0, 4)]
    # The quarters are a quarter each, from the top left on
    corners = [overlay.place[:2] for overlay in quarters.overlays]
    assert corners == [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]


def test_patches_cover_a_picture_up_to_its_last_whole_one(tmp_path: Path) -> None:
    case = CaseRecording([1], [2], "", ["a", "b"], [(7, 7)], 1)
    pixels = torch.zeros(100, 99 * 3, dtype=torch.uint8)
    case.stages = {"decode": [pixels], "tiles": [pixels.float()]}
    recording = write_recording(tmp_path, "ours", "float32", False, [*case.stages], {}, [case])
    (picture,) = case_pictures(recording, 0)
    assert picture.size == (99, 100)
    # Patches of 14 pixels
    assert picture.tiles == [pytest.approx((0, 0, 98 / 99, 98 / 100))]


def test_tokens_of_a_fault_are_marked(swapped: Comparison) -> None:
    chart = charts(swapped)["case-0-tokens"]
    assert isinstance(chart, HeatMap)
    columns = {column.title.split(":")[0]: column for column in chart.columns}
    assert all(column.is_marked for column in columns.values())
    index = list(columns).index("perceiver layer 0")
    images = [i for i, row in enumerate(chart.rows) if "<image> x 16" in row.label]
    assert len(images) == 5
    assert np.flatnonzero(~np.isnan(chart.values[:, index])).tolist() == images
    # Causal attention: what is before the first image is the same
    first_layer = list(columns).index("text layer 0")
    assert chart.values[: images[0], first_layer].max() == 0
    assert chart.values[images[0] :, first_layer].min() > 0
    assert charts(swapped).keys() == {"case-0-tokens", "case-0-image-0", "case-1-tokens"}


def test_page_names_the_first_difference(swapped: Comparison, clean: Comparison) -> None:
    page = page_of(swapped)
    headline = "First difference beyond rounding: patch embedding, largest at case 0, "
    assert page.subtitle.startswith(headline)
    assert figures(swapped)["First difference"] == ("patch embedding", "beyond rounding")
    (stage_table,) = page.first_tables
    assert stage_table.heading == "Stages"
    assert [row for row in stage_table.rows if row.is_bad]
    assert figures(clean)["Differences"] == ("none", "beyond rounding")
    assert figures(clean)["Cases with maps"] == ("1 of 1", "the worst first")
    assert not [row for table in page_of(clean).first_tables for row in table.rows if row.is_bad]


def test_result_is_printed_in_one_line(swapped: Comparison) -> None:
    first = swapped.first_difference
    place = "patch embedding, largest at case 0, image 0 "
    assert str(first).startswith(place)
    assert str(swapped) == f"first difference beyond rounding: {first}"
    # As pytest shows it if an assertion fails
    assert len(repr(swapped)) < 3000
    assert len(repr(swapped.worst_cases)) < 200


def test_page_needs_nothing_else_and_is_escaped(swapped: Comparison, tmp_path: Path) -> None:
    evil = [
        replace(worst, recording=replace(worst.recording, token_texts=[EVIL] * 200))
        for worst in swapped.worst_cases
    ]
    named = {**swapped.a, "path": EVIL.replace("https:", "")}
    write_report(replace(swapped, a=named, worst_cases=evil), tmp_path / "evil.html")
    assert "<img" not in (tmp_path / "evil.html").read_text(encoding="utf-8")
    write_report(swapped, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    check_page(content)
    assert content.count("<svg") == 2 * 3
    (tmp_path / "maps").mkdir()
    for name in ("case-9-tokens.svg", "case-9-image-1.svg", "case-study.svg"):
        (tmp_path / "maps" / name).touch()
    files = write_heat_maps(swapped, tmp_path / "maps")
    # Maps of an earlier comparison are gone, and other files are not
    (tmp_path / "maps" / "case-study.svg").unlink()
    assert set((tmp_path / "maps").iterdir()) == set(files)
    assert {path.stem for path in files} == charts(swapped).keys()
    assert all(b"prefers-color-scheme: dark" in path.read_bytes() for path in files)


def test_digests_and_equal_paths_have_no_maps_and_say_so(ours: Path, tmp_path: Path) -> None:
    write_digest(Recording.load(ours), tmp_path / "digest")
    digest = compare_on_cpu(ours, tmp_path / "digest", float64=False)
    assert digest.worst_cases == []
    note = "B is a digest, without the values of rows"
    assert figures(digest)["Cases with maps"] == ("0", note)
    assert "Largest KL" not in figures(digest)
    same = compare_on_cpu(ours, ours, float64=False)
    assert figures(same)["Cases with maps"] == ("0", "there is no difference to show")
    for comparison in (digest, same):
        assert write_heat_maps(comparison, tmp_path / "maps") == []
        check_page(render_page(page_of(comparison)).decode())


def text_cases(folder: Path, largest: list[float]) -> Legs:
    """Return legs whose cases differ as much as is given, each in its second token."""
    sides = []
    for name, scale in (("a", 1.0), ("b", 0.0)):
        cases = []
        for value in largest:
            case = CaseRecording([1, 2, 3], [4], "", list("abcd"), [], 1)
            rows = torch.ones(3, 2, dtype=torch.float64)
            rows[1, 1] += scale * value
            case.stages = {"text layer 0": [rows, rows[:0]]}
            cases.append(case)
        sides.append(
            write_recording(folder / name, name, "float32", False, ["text layer 0"], {}, cases)
        )
    return Legs(*sides)


def test_maps_are_named_by_what_is_asked(swapped: Comparison) -> None:
    headings = {name: chart.heading for name, chart in charts(swapped).items()}
    assert headings == {
        "case-0-tokens": 'Case 0, "Where is the star?", 1 image: tokens by layers',
        "case-0-image-0": 'Case 0, "Where is the star?", 1 image: patches of image 0',
        "case-1-tokens": 'Case 1, "a": tokens by layers',
    }
    long = replace(swapped.worst_cases[0].recording, question="a" * 99)
    assert f'"{"a" * 47}…"' in replace(swapped.worst_cases[0], recording=long).title
    raw = Case.raw("<image>The <image>\nend", ["a.png", "b.png"])
    assert raw.asked == "The end"


def test_worst_cases_are_first_and_few(tmp_path: Path) -> None:
    largest = [0.1, 0.9, 0.0, 0.5, 0.3, 0.2, 0.7, 0.6]
    legs, differences = text_cases(tmp_path, largest), RowDifferences()
    measure_stage(legs, "text layer 0", differences)
    found = worst_cases(legs, differences, [], [])
    assert [worst.case for worst in found] == [1, 6, 7, 3, 4, 5]
    assert len(found) == MOST_CASES
    assert found[0].differences["text layer 0"][0].tolist() == pytest.approx([0, 0.9, 0])
    # The case that the headline names is the first
    place = StageMeasure("text layer 0", place={"case": 2})
    assert worst_cases(legs, differences, [place], [])[0].case == 2


def big_case(case: int, order: list[str], grid: tuple[int, int]) -> WorstCase:
    """Return a case of the 8B model's size: two split pictures, and differences of all sizes."""
    random = np.random.default_rng(case)
    images = ["<image>"] * 64
    prompt = ["a", *(["b", *images] * 10), *(f"word {i}" for i in range(300))]
    recording = CaseRecording(
        list(range(len(prompt))),
        list(range(16)),
        "",
        [*prompt, *"abcdefghijklmnop"],
        [grid] * 10,
        5,
    )
    sizes = {
        "patch": [grid[0] * grid[1]] * 10,
        "latent": [64] * 10,
        "token": [len(prompt), 15],
        "pixels": [],
    }

    def rows(size: int) -> Any:
        return (10 ** random.uniform(-7, 0, size)).astype(np.float32)

    differences = {stage: [rows(size) for size in sizes[stages.unit(stage)]] for stage in order}
    halves = [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]
    tiles = [*((x, y, x + 0.5, y + 0.5) for x, y in halves), (0.0, 0.0, 1.0, 1.0)]
    picture = CasePicture(f"data:image/jpeg;base64,{'A' * 12_000}", (980, 980), tiles)
    return WorstCase(case, recording, differences, [picture, picture])


def test_page_of_a_large_model_is_small(swapped: Comparison) -> None:
    layers = [*(f"vision layer {i}" for i in range(3)), *(f"text layer {i}" for i in range(32))]
    names = ["patch embedding", *layers, *(f"perceiver layer {i}" for i in range(3)), "logits"]
    stage = next(one for one in swapped.stages if one.stage == "patch embedding")
    results = [
        replace(stage, stage=name, measure=replace(stage.measure, stage=name)) for name in names
    ]
    cases = [big_case(case, names, (70, 70)) for case in range(MOST_CASES)]
    large = replace(swapped, stages=results, num_cases=12, worst_cases=cases)
    content = render_page(page_of(large))
    assert len(content) < 3_500_000
    check_page(content.decode())
    assert figures(large)["Cases with maps"][1].endswith("without 6, 7, 8, 9, 10, 11")
    drawn = charts(large)
    assert isinstance(drawn["case-0-tokens"], HeatMap)
    labels = [row.label for row in drawn["case-0-tokens"].rows]
    assert len(labels) <= 64
    # Each image keeps a row of its own, and other tokens share rows
    assert [label for label in labels if "<image>" in label][:2] == [
        "2 <image> x 64",
        "67 <image> x 64",
    ]
    assert sum("<image>" in label for label in labels) == 10
    assert sum(int(label.split()[-1]) for label in labels if "…" in label or " x " in label) > 900
    assert all(len(svg_file(chart)) < 256_000 for chart in drawn.values())
