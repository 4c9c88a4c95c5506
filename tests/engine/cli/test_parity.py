"""The command ``idefics2 parity``: inputs, output and exit codes."""

import json
from pathlib import Path

import pytest

from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.parity.recording.dump import Recording
from idefics2_engine.parity.words import place_text
from page_check import check_page

SMALL = ["--prompt", "Is there a star?", "--max-tokens", "2", "--device", "cpu"]


def parity(*arguments: str | Path) -> int:
    return main(["parity", *map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved") / "a"
    assert parity("ours:reference", "--save", folder, *SMALL) == 0
    return folder


def test_table_has_a_line_for_each_stage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity(saved, "ours:deterministic", *SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A  ours:reference: float32 on cpu, torch ")
    assert lines[2] == "1 case, judged against float64"
    stages = [line.split("  ")[0] for line in lines[5:-3]]
    assert stages == Recording.load(saved).order
    assert lines[-1] == "no difference beyond rounding"


def test_bitwise_passes_for_the_same_path_alone(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity("ours:reference", saved, "--bitwise", "--no-float64", *SMALL) == 0
    assert capsys.readouterr().out.endswith("same bits at every stage\n")
    assert parity("ours:deterministic", saved, "--bitwise", "--no-float64", *SMALL) == 1
    assert "without a float64 leg rounding is not judged" in capsys.readouterr().out
    assert parity("ours:deterministic", saved, "--no-float64", *SMALL) == 0


def test_difference_is_exit_code_1(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity("ours:deterministic", saved, "--ratio", "1e-9", "--json", *SMALL) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["first_difference"] == "text layer 0"
    assert not result["within_rounding"]
    by_stage = {one["stage"]: one for one in result["stages"]}
    assert by_stage["text embedding"]["verdict"] == "same bits"
    assert by_stage["text layer 0"]["verdict"] == "differs"
    assert by_stage["text layer 0"]["place"]["token_text"]
    assert by_stage["logits"]["error_a"] > 0
    assert result["logits"]["top1_agreement"] == 1.0


def test_headline_names_stage_and_place(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity("ours:deterministic", saved, "--ratio", "1e-9", *SMALL) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    wanted = "first difference beyond rounding: text layer 0, largest at case 0, token "
    assert last.startswith(wanted)


def test_difference_is_found_inside_a_layer_and_explained(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = ("--inside", "text layer 0")
    assert parity("ours:reference", "--save", tmp_path / "b", *inside, *SMALL) == 0
    paths = ("ours:deterministic", tmp_path / "b")
    # Every difference counts, so that swapping what is not the reference explains it
    options = ("--ratio", "1e-9", "--bisect", *inside, *SMALL)
    capsys.readouterr()
    assert parity(*paths, "--json", *options) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["first_difference"] == "text layer 0 queries"
    explanations = result["bisection"]["explanations"]
    assert explanations[0] == {"stage": "text layer 0 queries", "operations": ["linear"]}
    assert result["bisection"]["trials"] > len(explanations)
    found = [name for one in explanations for name in one["operations"]]
    swap = [word for name in found for word in ("--swap", name)]
    assert parity(*paths, *swap, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"with the reference's {', '.join(found)}" in lines[0]
    assert lines[-1] == "nothing to bisect: no stage differs"


def test_images_prompts_and_rows_are_inputs(tmp_path: Path) -> None:
    image = DEMO_IMAGES / "sign.png"
    more = ("--max-tokens", "1", "--device", "cpu")
    options = ("--image", image, "--prompt", "a", "--prompt", "b", "--no-split", *more)
    assert parity("ours", "--save", tmp_path / "options", "--digest", *options) == 0
    (tmp_path / "sign.png").write_bytes(image.read_bytes())
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"images": ["sign.png"], "prompt": p}) + "\n" for p in ("a", "b"))
    )
    rows = ("--rows", tmp_path / "rows.jsonl", "--no-split", *more)
    assert parity("ours", "--save", tmp_path / "rows", "--digest", *rows) == 0
    a, b = (Recording.load(tmp_path / name) for name in ("options", "rows"))
    assert a.is_digest
    assert len(a.cases) == 2
    assert [case.ids for case in a.cases] == [case.ids for case in b.cases]
    assert a.hashes == b.hashes


def test_page_and_heat_maps_are_written(saved: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "new" / "maps"
    files = ("--report", page, "--svg", folder)
    assert parity("ours:deterministic", saved, "--ratio", "1e-9", *files, *SMALL) == 1
    content = page.read_text(encoding="utf-8")
    check_page(content)
    assert "First difference beyond rounding: text layer 0, largest at case 0, token " in content
    assert [path.name for path in folder.iterdir()] == ["case-0-tokens.svg"]


def test_equal_paths_have_no_heat_maps(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity("ours:reference", saved, "--svg", tmp_path / "maps", *SMALL) == 0
    assert not (tmp_path / "maps").exists()
    message = "no heat maps were written: there is no difference to show"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vllm"], "a path must be ours"),
        (["ours", "--digest"], "--digest must come with --save"),
        (["ours", "--image", "a.png"], "must come with --prompt"),
        (["ours", "--rows", "a", "--raw"], "--rows must come without"),
        (["ours", "--swap", "rmsnorm"], "an operation to swap must be one of linear, "),
        (["transformers", "--swap", "linear", "--save", "x"], "swap must come with a path of ours"),
        (["ours", "--bisect", "--save", "x"], "--bisect must come with a path B"),
        (["ours", "--bisect", "--no-float64"], "bisect must come with the float64 leg"),
        (["ours", "--inside", "layer 2"], "a layer to look inside must be all or one from vision"),
        (["ours", "--report", "/none/page.html"], "expected a file in a folder that exists"),
        (["ours", "--report", "/"], "expected a file in a folder that exists"),
        (["ours", "--svg", __file__], "expected a folder or a new one"),
        (["ours", "--save", "x", "--svg", "y"], "must come with two paths, got one"),
        (["ours", "--ratio", "0"], "expected a number above 0"),
        (["ours", "--prompt", "a", "--image", "missing.png"], "cannot be read as an image"),
        (["float64", "--save", "x", "--prompt", "a"], "must be ours or transformers"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity(*arguments) == 2
    assert message in capsys.readouterr().err


def test_places_are_words() -> None:
    place = {"case": 3, "image": 0, "part": "top left", "patch": [2, 5], "element": 7}
    assert place_text(place) == "case 3, image 0 top left, patch 2 5, element 7"
    assert place_text({"case": 1, "token": 4, "token_text": " a"}) == "case 1, token 4 ' a'"
