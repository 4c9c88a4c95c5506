"""lmms-eval with our model: its command on tasks made here, and its evaluator on choices."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")

from harness_tasks import Document, documents, right_answers, write_tasks
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.evaluation.continuations import Continuation
from paths import DEMO

# What lmms-eval and its packages do to themselves
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=96)


@pytest.fixture(scope="module")
def made() -> list[Document]:
    return documents()


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(split_images=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, made: list[Document]) -> Path:
    folder: Path = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, "lmms_eval", made)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tasks: Path) -> tuple[Path, str]:
    """Run the command as a user types it; return the folder of its files and what it said."""
    output: Path = tmp_path_factory.mktemp("output")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "idefics2_engine"),
            *("--model_args", f"pretrained={DEMO},max_num_seqs=128,split_images=False"),
            *("--tasks", "scenes,scene_rounds,bad_picture", "--include_path", str(tasks)),
            *("--output_path", str(output), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout + done.stderr


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    (file,) = output.rglob(f"*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def results(output: Path) -> dict[str, Any]:
    (file,) = output.rglob("*_results.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


def test_answers_and_accuracy_are_those_without_a_harness(
    run: tuple[Path, str], made: list[Document], demo: LLM
) -> None:
    outputs = demo.chat([document.conversation() for document in made], GREEDY)
    rows = samples(run[0], "scenes")
    assert [row["filtered_resps"] for row in rows] == [one.outputs[0].text for one in outputs]
    assert [row["token_counts"] for row in rows] == [
        [
            {
                "input_tokens": len(one.prompt_token_ids),
                "output_tokens": len(one.outputs[0].token_ids),
            }
        ]
        for one in outputs
    ]
    assert results(run[0])["scenes"]["right,none"] == pytest.approx(right_answers(demo))


def test_second_round_follows_the_first_answer(
    run: tuple[Path, str], made: list[Document], demo: LLM
) -> None:
    firsts = demo.chat([document.conversation() for document in made], GREEDY)
    pairs = zip(made, firsts, strict=True)
    seconds = demo.chat(
        [document.conversation(first.outputs[0].text) for document, first in pairs], GREEDY
    )
    assert [row["filtered_resps"] for row in samples(run[0], "scene_rounds")] == [
        [first.outputs[0].text, second.outputs[0].text]
        for first, second in zip(firsts, seconds, strict=True)
    ]


def test_a_bad_picture_costs_its_own_answer_and_a_line_of_the_log(
    run: tuple[Path, str], made: list[Document], demo: LLM
) -> None:
    rows = samples(run[0], "bad_picture")
    for place in (0, 2):
        parts = made[place].conversation()[0]["content"]
        pictures_first = [{"role": "user", "content": sorted(parts, key=lambda part: part["type"])}]
        (output,) = demo.chat(pictures_first, GREEDY)
        assert rows[place]["filtered_resps"] == output.outputs[0].text
    assert rows[1]["filtered_resps"] == ""
    assert "document 1 of bad_picture has no answer: UnidentifiedImageError: " in run[1]
    assert "1 of 23 requests have no answer" in run[1]


def test_likelihoods_are_those_of_whole_answers(
    tasks: Path, made: list[Document], demo: LLM
) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model="idefics2_engine",
        model_args=f"pretrained={DEMO},split_images=False",
        tasks=["scene_choices"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        force_simple=True,
    )
    rows = sorted(found["samples"]["scene_choices"], key=lambda row: int(row["doc_id"]))
    right = 0
    for row, document in zip(rows, made, strict=True):
        losses = []
        for choice, (loss, is_greedy) in zip(document.choices, row["filtered_resps"], strict=True):
            wanted, greedy_answer = exact_loss(demo, document, choice)
            assert loss == pytest.approx(wanted, abs=1e-4)
            assert is_greedy == (choice == greedy_answer)
            losses.append(wanted)
        right += losses[document.right_choice] == min(losses)
    assert found["results"]["scene_choices"]["acc,none"] == pytest.approx(right / len(made))


def exact_loss(llm: LLM, document: Document, choice: str) -> tuple[float, str]:
    """Return the loss of an answer by the whole prompt's scores, and the greedy answer."""
    (answer,) = llm.chat(document.conversation(), GREEDY)
    end = llm.processor.tokenizer.end_of_utterance_id
    assert end is not None
    whole = Continuation.of_chat(llm.processor, document.conversation(), choice, [end])
    assert whole.token_ids[-1] == end
    assert whole.token_ids[: whole.start] == answer.prompt_token_ids
    prompt = {
        "prompt_token_ids": whole.token_ids,
        "multi_modal_data": {"image": [document.picture]},
    }
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (scored,) = llm.generate(prompt, params)
    assert scored.prompt_logprobs is not None
    places = [*zip(whole.token_ids, scored.prompt_logprobs, strict=True)][whole.start :]
    scores = [place[token].logprob for token, place in places if place]
    return -sum(scores) / len(scores), answer.outputs[0].text
