"""With ``ROW_BY_ROW``, log probabilities do not depend on the batch, chunks, prefixes and order."""

import json
from typing import Any

import pytest

from idefics2_engine import LLM, Row, SamplingParams
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_kernels import ROW_BY_ROW
from paths import ROOT

QUESTIONS = [
    json.loads(line)
    for line in (ROOT / "examples/jobs/questions.jsonl").read_text().splitlines()[:4]
]


def answers(order: list[int], **options: Any) -> dict[Any, Any]:
    rows = [Row(index, conversation(QUESTIONS[index])) for index in order]
    params = SamplingParams(temperature=0.7, max_tokens=6, logprobs=2)
    with LLM(device="cpu", ops=ROW_BY_ROW, split_images=False, **options) as llm:
        return {
            output.key: (output.outputs[0].token_ids, output.outputs[0].logprobs)
            for output in llm.iterate(rows, params)
        }


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": str(DEMO_IMAGES / name)} for name in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["prompt"]}]}]


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ([3], {}),
        ([3, 2, 1, 0], {"max_num_seqs": 2, "max_num_batched_tokens": 13}),
        ([0, 1, 2, 3], {"enable_prefix_caching": False, "max_num_seqs": 1}),
    ],
)
def test_log_probabilities_are_those_of_the_row_alone(
    order: list[int], options: dict[str, Any], everything: dict[Any, Any]
) -> None:
    assert answers(order, **options) == {index: everything[index] for index in order}


@pytest.fixture(scope="module")
def everything() -> dict[Any, Any]:
    return answers([0, 1, 2, 3])
