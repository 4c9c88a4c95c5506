"""Golden files: what they may have, and answers that are compared with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from idefics2_engine.errors import ConfigError
from idefics2_engine.parity import check_golden
from idefics2_engine.parity.golden.golden_check import first_other
from idefics2_engine.parity.golden.golden_file import PACKAGED, GoldenFile
from idefics2_engine.parity.inputs import Case, Processors

TOKENS = 5
PROMPT = "<image>The picture shows"
Golden = dict[str, Any]


@pytest.fixture(scope="module")
def golden() -> Golden:
    """Return golden answers of the demo, made with ``LLM`` as the docs show."""
    prompt = {
        "prompt": PROMPT,
        "multi_modal_data": {"image": str(DEMO_IMAGES / "shapes.png")},
    }
    with LLM(DEMO_MODEL, device="cpu", dtype="float32") as llm:
        (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=TOKENS))
    answer = output.outputs[0]
    common = {"prompt": PROMPT, "images": ["shapes.png"]}
    return {
        "format": 1,
        "cases": [
            {"name": "ids", **common, "token_ids": list(answer.token_ids)},
            {"name": "text", **common, "max_tokens": TOKENS, "texts": [f" {answer.text}"]},
        ],
    }


def write(golden: Golden, folder: Path, **changes: Any) -> Path:
    """Write a golden file, whose first case has other values."""
    cases = [{**golden["cases"][0], **changes}, *golden["cases"][1:]]
    file = folder / "golden.json"
    file.write_text(json.dumps({**golden, "cases": cases}))
    return file


def check(file: Path, path: str = "ours:reference:fp32", **settings: Any) -> Any:
    return check_golden(path, file, images=DEMO_IMAGES, device="cpu", **settings)


def test_right_answers_pass(golden: Golden, tmp_path: Path) -> None:
    result = check(write(golden, tmp_path))
    assert result.passed
    assert [one.name for one in result.results] == ["ids", "text"]
    assert result.results[0].text == result.results[0].golden_text
    assert result.results[0].text.strip() == golden["cases"][1]["texts"][0].strip()


def test_transformers_has_the_same_answers(golden: Golden, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert check(write(golden, tmp_path), "transformers:fp32").passed


def test_first_other_token_is_named(golden: Golden, tmp_path: Path) -> None:
    ids = golden["cases"][0]["token_ids"]
    wrong = [*ids[:2], ids[2] + 1, *ids[3:]]
    logprobs = [-0.5] * TOKENS
    result = check(write(golden, tmp_path, token_ids=wrong, logprobs=logprobs))
    assert not result.passed
    first, second = result.results
    tokenizer = Processors(DEMO_MODEL).of(Case.raw("a")).tokenizer
    assert first.parts_at == 2
    assert first.tokens == tuple(tokenizer.decode([i]) for i in (ids[2], wrong[2]))
    assert first.golden_logprob == -0.5
    assert second.parts_at is None


def test_one_of_several_texts_is_enough(golden: Golden, tmp_path: Path) -> None:
    right = golden["cases"][1]["texts"][0]
    wrong = f"{right[: len(right) // 2]}#"
    only_text = {**golden, "cases": golden["cases"][1:]}
    assert check(write(only_text, tmp_path, texts=["#", right])).passed
    (result,) = check(write(only_text, tmp_path, texts=["#", wrong])).results
    # The text that the answer follows longest is shown
    assert result.golden_text == wrong
    assert 0 < result.parts_at < TOKENS
    (result,) = check(write(only_text, tmp_path, texts=[f"{right}#"])).results
    assert result.parts_at == TOKENS
    assert result.tokens == (None, None)


def test_images_are_scaled_as_the_case_says(golden: Golden, tmp_path: Path) -> None:
    """Both implementations scale down further than the checkpoint does."""
    pytest.importorskip("transformers")
    from parity_recordings import compare_on_cpu

    edge = Processors(DEMO_MODEL).of(Case.raw("a")).image_config.shortest_edge
    case = Case((DEMO_IMAGES / "shapes.png",), text=PROMPT, split=False, longest_edge=edge)
    after = Case(case.images, text=PROMPT, split=False)
    processors = Processors(DEMO_MODEL)
    sizes = [max(one.process(processors.of(one)).tiles[0].pixels.shape) for one in (case, after)]
    assert edge == sizes[0] < sizes[1]
    assert compare_on_cpu("ours", "transformers", cases=[case, after]).within_rounding
    with pytest.raises(ConfigError, match=f"longest_edge must be at least .* {edge}, got 1"):
        check(write(golden, tmp_path, longest_edge=1))


def test_other_quantization_is_skipped(golden: Golden, tmp_path: Path) -> None:
    result = check(write(golden, tmp_path, quantization="nf4"))
    assert [one.skipped for one in result.results] == ["its weights were nf4", None]
    assert result.passed
    only = {**golden, "cases": golden["cases"][:1]}
    with pytest.raises(ConfigError, match="must have a case for ours:float32:nf4, got ids: its"):
        check(write(only, tmp_path), "ours:float32:nf4")


@pytest.mark.parametrize(
    ("ids", "golden", "at"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 2], None),
        ([1, 2], [1, 2, 3], 2),
        ([1, 5, 3], [1, 2, 3], 1),
        ([], [1], 0),
    ],
)
def test_golden_tokens_are_the_first_of_the_answer(
    ids: list[int], golden: list[int], at: int | None
) -> None:
    assert first_other(ids, golden) == at


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_files_name_their_model_and_sources(name: str) -> None:
    file = GoldenFile.load(name)
    assert file.model == f"HuggingFaceM4/{name}"
    for case in file.cases:
        assert case.source
        assert case.prompt.count("<image>") == len(case.images) > 0
        assert all(file.images[image].startswith("https://") for image in case.images)
    with pytest.raises(ConfigError, match=f"model must be HuggingFaceM4/{name}"):
        check_golden("ours", name, device="cpu")
    with pytest.raises(ConfigError, match=r"no such picture: it is published at https://"):
        check_golden("ours", name, model=DEMO_MODEL, device="cpu")


def test_published_answers_with_the_same_end_have_the_same_tokens() -> None:
    (one, two) = GoldenFile.load("idefics2-8b").cases
    assert len(one.token_ids) == len(one.logprobs) == 10
    assert two.token_ids[-1] == 32002
    assert one.token_ids[-4:] == two.token_ids[-5:-1]
    assert one.texts[0].split()[-3:] == two.texts[0].split()[-3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": []}, "case 0: token_ids, or texts and max_tokens, must be given"),
        ({"token_ids": [1.5]}, "case 0: token_ids must be a list of token ids"),
        ({"logprobs": [-1.0]}, "case 0: logprobs must be one for each of 5 token_ids, got 1"),
        ({"prompt": 3}, "case 0: prompt must be a string, got 3"),
        ({"tokens": []}, "case 0: unknown key 'tokens'"),
        ({"name": "text"}, "names must differ, got 'text' twice"),
        ({"images": ["other.png"]}, "other.png: no such picture"),
    ],
)
def test_malformed_files_are_refused(
    changes: dict[str, Any], message: str, golden: Golden, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(write(golden, tmp_path, **changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"format": 1, "cases": []}, "cases must be a list of one or more"),
        ({"format": 1, "cases": [3]}, "case 0: must be an object, got 3"),
        ({"format": 1, "cases": [{"name": "a"}]}, "case 0: must have prompt, got none"),
        ({"format": 1, "answers": []}, "unknown key 'answers'"),
        ({"format": 1, "images": []}, "images must be an object of texts"),
    ],
)
def test_other_files_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "golden.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        GoldenFile.load(tmp_path / "golden.json")


def test_recordings_give_no_golden_answers(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be ours or transformers to give answers"):
        check(write(golden, tmp_path), "float64")


def parity(*arguments: str | Path) -> int:
    return main(["parity", *map(str, arguments)])


def test_command_compares_and_exits(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--golden-images", DEMO_IMAGES, "--device", "cpu")
    assert parity("ours:fp32", "--golden", write(golden, tmp_path), *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A  ours:float32: float32 on cpu")
    assert lines[1].startswith("ids: the same answer, ")
    assert lines[-1] == f"2 of 2 answers are those of {tmp_path / 'golden.json'}"
    ids = golden["cases"][0]["token_ids"]
    wrong = write(golden, tmp_path, token_ids=[ids[0] + 1], logprobs=[-0.6931472])
    assert parity("ours:fp32", "--golden", wrong, *where) == 1
    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith("ids: parts at token 0, wanted ")
    assert " with probability 0.5, got " in first
    assert parity("ours:fp32", "--golden", wrong, "--json", *where) == 1
    values = json.loads(capsys.readouterr().out)
    assert not values["passed"]
    assert [case["parts_at"] for case in values["cases"]] == [0, None]


@pytest.mark.parametrize(
    "more", [["ours"], ["--prompt", "a"], ["--bisect"], ["--save", "x"], ["--no-float64"]]
)
def test_options_of_comparisons_are_refused(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity("ours", *more, "--golden", "idefics2-8b") == 2
    assert "--golden must come without" in capsys.readouterr().err
