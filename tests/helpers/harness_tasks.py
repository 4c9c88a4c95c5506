"""Tasks of evaluation harnesses about scenes drawn here: questions, and choices of two answers.

The questions are those that ``evaluate_demo.py`` asks, so its answers are known without a harness.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from conversations import held_out_seed
from evaluate_demo import evaluate_kind
from idefics2_engine import LLM
from pictures import file
from questions import question_of_kind
from scenes import render

# Without splitting, the demo checkpoint counts wrongly in some of these scenes
KINDS = ("count_of", "where")
PER_KIND = 10
NAMES = {
    "lmms_eval": ("scenes", "scene_choices", "scene_rounds", "bad_picture"),
    "lm_eval": ("scenes", "scene_choices"),
}

_LMMS_EVAL = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {folder}/cache
test_split: test
doc_to_visual: !function made.pictures
doc_to_text: !function made.{text}
doc_to_target: {target}
"""
_LM_EVAL = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {folder}/cache
test_split: test
doc_to_image: !function made.pictures
doc_to_text: !function made.{text}
doc_to_target: {target}
"""
_ANSWERS = """\
task: {name}
output_type: generate_until
{messages}
generation_kwargs:
  max_new_tokens: 96
  do_sample: false
process_results: !function made.is_right
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
_CHOICES = """\
task: {name}
output_type: multiple_choice
doc_to_choice: !function made.choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_ROUNDS = """\
task: {name}
output_type: generate_until_multi_round
{messages}
generation_kwargs:
  max_new_tokens: 96
  do_sample: false
process_results: !function made.is_right_twice
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
_KINDS = {
    "scenes": _ANSWERS,
    "bad_picture": _ANSWERS,
    "scene_choices": _CHOICES,
    "scene_rounds": _ROUNDS,
}
_MADE = '''\
def pictures(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def prompt(doc):
    return doc["question"] + "<image>" if doc["text_first"] else "<image>" + doc["question"]


def choices(doc):
    return doc["choices"]


def is_right(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}


def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
    """Ask the question twice, the second time after the first answer."""
    asked = {"type": "text", "text": doc["question"]}
    picture = {"type": "image", "url": doc["image"]}
    parts = [asked, picture] if doc["text_first"] else [picture, asked]
    turns = [{"role": "user", "content": parts}]
    if not round_idx:
        return turns
    assert previous_round_info == (None if round_idx == 1 else "a note")
    answer = {"type": "text", "text": previous_output[-1]}
    turns.append({"role": "assistant", "content": [answer]})
    turns.append({"role": "user", "content": [asked]})
    return turns, round_idx == 2, previous_output, "a note"


def is_right_twice(doc, results):
    (answers,) = results
    return {"right": float(answers[0].strip() == doc["answer"]) * (len(answers) == 2)}
'''


@dataclass(frozen=True, eq=False)
class Document:
    """One picture with its question, the right answer and another one of the same kind."""

    picture: Image.Image
    question: str
    # Whether the question precedes the picture
    text_first: bool
    answer: str
    choices: tuple[str, str]
    right_choice: int

    def conversation(self, *answers: str) -> list[dict[str, Any]]:
        """Return the question, asked again after each of ``answers``."""
        question = {"type": "text", "text": self.question}
        picture = {"type": "image", "image": self.picture}
        parts = [question, picture] if self.text_first else [picture, question]
        turns: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        for answer in answers:
            turns.append({"role": "assistant", "content": answer})
            turns.append({"role": "user", "content": [question]})
        return turns


def documents() -> list[Document]:
    """Draw the pictures of the tasks."""
    made = []
    for kind in KINDS:
        asked = [question_of_kind(kind, held_out_seed(kind, place)) for place in range(PER_KIND)]
        turns = [conversation.turns[0] for _, conversation in asked]
        for place, (scenes, conversation) in enumerate(asked):
            question, answer = turns[place]
            other = next(one for _, one in turns if one != answer)
            choices = (other, answer) if place % 2 else (answer, other)
            first = conversation.text_first
            made.append(Document(render(scenes[0]), question, first, answer, choices, place % 2))
    return made


def right_answers(llm: LLM) -> float:
    """Return the share of the questions that the model answers right, by ``evaluate_demo.py``."""
    return sum(evaluate_kind(llm, kind, PER_KIND)[0] for kind in KINDS) / (PER_KIND * len(KINDS))


def write_tasks(folder: Path, harness: str, made: list[Document]) -> None:
    """Write the tasks ``NAMES`` of a harness."""
    rows = [
        {
            "image": {"bytes": file(document.picture, "PNG"), "path": None},
            "question": document.question,
            "text_first": document.text_first,
            "answer": document.answer,
            "choices": list(document.choices),
            "right_choice": document.right_choice,
        }
        for document in made
    ]
    _write(folder / "scenes.parquet", rows)
    # lmms-eval makes Pillow read pictures that are cut off
    rows[1] = {**rows[1], "image": {"bytes": b"no picture", "path": None}}
    _write(folder / "bad_picture.parquet", rows[:3])
    (folder / "made.py").write_text(_MADE, encoding="utf-8")
    form = _LMMS_EVAL if harness == "lmms_eval" else _LM_EVAL
    for name in NAMES[harness]:
        table = folder / ("bad_picture.parquet" if name == "bad_picture" else "scenes.parquet")
        target = "right_choice" if name == "scene_choices" else "answer"
        # With messages lmms-eval's chat models don't look at the text
        has_messages = harness == "lmms_eval" and name in ("scenes", "scene_rounds")
        messages = "doc_to_messages: !function made.messages" if has_messages else ""
        lines = _KINDS[name].format(name=name, messages=messages)
        text = "question" if name == "bad_picture" else "prompt"
        lines += form.format(file=table, folder=folder, target=target, text=text)
        (folder / f"{name}.yaml").write_text(lines, encoding="utf-8")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "text_first": datasets.Value("bool"),
            "answer": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "right_choice": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
