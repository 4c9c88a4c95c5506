"""lm-evaluation-harness with our model: its command on tasks made here, and texts."""

import json
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (docs/evaluation.md)")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from harness_tasks import NAMES, Document, documents, right_answers, write_tasks
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.evaluation.lm_eval_model import Idefics2EngineLM
from paths import DEMO, EXAMPLES

# What lm-evaluation-harness and its packages do to themselves
pytestmark = pytest.mark.filterwarnings("ignore::Warning")

GREEDY = SamplingParams(temperature=0.0, max_tokens=96)
LONGEST = 120


@pytest.fixture(scope="module")
def made() -> list[Document]:
    return documents()


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(split_images=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def model() -> Iterator[Idefics2EngineLM]:
    """Load the model by the harness's function, with a length that texts exceed."""
    options = {"split_images": False, "max_model_len": LONGEST, "max_gen_toks": 8}
    lm = Idefics2EngineLM.create_from_arg_obj(options, {"batch_size": 1, "device": "cuda:0"})
    yield lm
    lm.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, made: list[Document]) -> Path:
    """Run the script as a user types it; return the folder of its files."""
    folder: Path = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, "lm_eval", made)
    script = str(EXAMPLES / "lm_eval_idefics2.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv",
            [
                *(script, "run", "--model", "idefics2_engine", "--apply_chat_template"),
                *("--model_args", f"pretrained={DEMO},split_images=False"),
                *("--tasks", ",".join(NAMES["lm_eval"]), "--include_path", str(folder)),
                *("--output_path", str(folder / "output"), "--log_samples"),
            ],
        )
        runpy.run_path(script, run_name="__main__")
    return folder / "output"


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    (file,) = output.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def results(output: Path) -> dict[str, Any]:
    (file,) = output.rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("made here", 7, 1))


def exact(llm: LLM, prompt: str | list[int], images: list[Any], start: int) -> tuple[float, bool]:
    """Return the score of a prompt's tokens from ``start`` on, by the scores of all its tokens."""
    name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate({name: prompt, "multi_modal_data": {"image": images}}, params)
    assert output.prompt_logprobs is not None
    places = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)][start:]
    scored = [place[token] for token, place in places if place]
    return sum(place.logprob for place in scored), all(place.rank == 1 for place in scored)


def test_answers_and_accuracy_are_those_without_a_harness(
    output: Path, made: list[Document], demo: LLM
) -> None:
    outputs = demo.chat([document.conversation() for document in made], GREEDY)
    assert [row["filtered_resps"] for row in samples(output, "scenes")] == [
        [one.outputs[0].text] for one in outputs
    ]
    assert results(output)["scenes"]["right,none"] == pytest.approx(right_answers(demo))


def test_likelihoods_of_choices_are_those_of_whole_prompts(
    output: Path, made: list[Document], demo: LLM
) -> None:
    right = 0
    for row, document in zip(samples(output, "scene_choices"), made, strict=True):
        chat = demo.processor.chat(document.conversation())
        context, start = chat.prompt, len(chat.token_ids)
        scores = []
        for choice, (score, is_greedy) in zip(document.choices, row["filtered_resps"], strict=True):
            wanted, all_best = exact(demo, f"{context} {choice}", [document.picture], start)
            assert float(score) == pytest.approx(wanted, abs=1e-3)
            assert is_greedy in (all_best, str(all_best))
            scores.append(wanted)
        right += scores[document.right_choice] == max(scores)
    assert results(output)["scene_choices"]["acc,none"] == pytest.approx(right / len(made))


def test_choices_share_their_picture_and_question(
    made: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = Idefics2EngineLM(split_images=False)
    try:
        context = "User:<image>" + "Look at the picture. " * 20
        media = {"visual": [made[0].picture]}
        requests = [request("loglikelihood", context, f" {answer}", media) for answer in "abcd"]
        stats = lm.llm.stats
        before = stats.cached_tokens
        assert len(lm.loglikelihood(requests)) == 4
        tokens = len(lm.tok_encode(context))
        assert stats.cached_tokens - before >= 3 * (tokens // 64 * 64 - 64) > 0
    finally:
        lm.close()


def test_texts_without_pictures(model: Idefics2EngineLM, demo: LLM) -> None:
    got = model.loglikelihood(
        [
            request("loglikelihood", "Where is the", " star?"),
            request("loglikelihood", "Where is the ", "star?"),
            request("loglikelihood", "", "The star"),
        ]
    )
    assert got[0][0] == pytest.approx(got[1][0])
    assert got[0][1] == got[1][1]
    start = len(demo.processor.tokenizer.encode("Where is the"))
    for (score, is_greedy), wanted in zip(
        got[1:],
        (exact(demo, "Where is the star?", [], start), exact(demo, "The star", [], 1)),
        strict=True,
    ):
        assert score == pytest.approx(wanted[0], abs=1e-4)
        assert is_greedy == wanted[1]


def test_rolling_texts_count_each_token_once(model: Idefics2EngineLM, demo: LLM) -> None:
    short = "The star is at the top right."
    long = "There is one circle, and a red square on the left of it. " * 20
    first, second = model.loglikelihood_rolling(
        [request("loglikelihood_rolling", short), request("loglikelihood_rolling", long)]
    )
    assert first == pytest.approx(exact(demo, short, [], 1)[0], abs=1e-3)
    token_ids = demo.processor.tokenizer.encode(long, add_bos=False)
    size = LONGEST - 2
    assert len(token_ids) > 2 * size
    wanted, scored = 0.0, 0
    while scored < len(token_ids):
        end = min(len(token_ids), scored + size)
        # The first window begins with the token that begins texts, and later ones are full
        begin = max(0, end - size - 1) if scored else 0
        window = token_ids[begin:end] if scored else [model.prefix_token_id, *token_ids[:end]]
        wanted += exact(demo, window, [], len(window) - (end - scored))[0]
        scored = end
    assert second == pytest.approx(wanted, abs=1e-2)


def test_a_context_that_is_too_long_loses_its_beginning(model: Idefics2EngineLM, demo: LLM) -> None:
    context = "There is one circle. " * 60
    token_ids = demo.processor.tokenizer.encode(context)
    (answer,) = model.generate_until([request("generate_until", context, {"max_gen_toks": 5})])
    params = SamplingParams(temperature=0.0, max_tokens=5)
    (wanted,) = demo.generate({"prompt_token_ids": token_ids[-(LONGEST - 5) :]}, params)
    assert answer == wanted.outputs[0].text
    ((score, _),) = model.loglikelihood([request("loglikelihood", context, " A star.")])
    whole = demo.processor.tokenizer.encode(context.rstrip() + "  A star.")[-(LONGEST - 1) :]
    start = len(whole) - len(demo.processor.tokenizer.encode(context.rstrip() + "  A star."))
    start += len(demo.processor.tokenizer.encode(context.rstrip()))
    assert score == pytest.approx(exact(demo, whole, [], start)[0], abs=1e-3)


def test_a_bad_picture_costs_its_own_result(
    model: Idefics2EngineLM, made: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = {"visual": [made[0].picture]}, {"visual": [b"no picture"]}
    texts = model.generate_until(
        [request("generate_until", "User:<image>Hi.", {}, media) for media in (bad, good)]
    )
    assert texts[0] == ""
    scores = model.loglikelihood(
        [request("loglikelihood", "User:<image>Hi.", " A", media) for media in (good, bad)]
    )
    assert math.isfinite(scores[0][0])
    assert scores[1] == (-math.inf, False)
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("document 7 of made here has no answer: ") for line in said) == 2


def test_chat_template_ends_where_the_answer_goes_on(model: Idefics2EngineLM) -> None:
    history = [
        {"role": "user", "content": "<image>What is left of <image>?"},
        {"role": "assistant", "content": "It is"},
    ]
    asked = "User:<image>What is left of <image>?<end_of_utterance>\nAssistant:"
    assert model.apply_chat_template(history[:1]) == asked
    assert model.apply_chat_template(history, add_generation_prompt=False) == f"{asked} It is"


def test_stored_results_are_found_again(
    model: Idefics2EngineLM, tmp_path: Path, made: list[Document]
) -> None:
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    requests = [request("generate_until", "User:<image>Hi.", {}, {"visual": [made[0].picture]})]
    texts = cached.generate_until(requests)
    computed = model.llm.stats.computed_tokens
    assert cached.generate_until(requests) == texts
    assert model.llm.stats.computed_tokens == computed
