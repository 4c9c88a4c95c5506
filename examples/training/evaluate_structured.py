"""Compare constrained answers of the demo checkpoint with free ones, on held-out questions.

    PYTHONPATH=engine:kernels python examples/training/evaluate_structured.py --count 200

Multiple choice: each question of ``--kind`` has four answers, the right one and three that are right
for other questions of its kind. The program counts right answers, free and with these four as
``choice``. JSON: it asks for an object, and counts answers of ``SCHEMA``, free and with it as
``json``. Answers are decoded greedily. This needs the extra ``structured``.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from conversations import held_out_seed, messages
from idefics2_engine import LLM, SamplingParams, StructuredOutputsParams
from one_image import ONE_IMAGE
from questions import question_of_kind
from scenes import render

_CHOICES = 4
_MAX_TOKENS = 96
_REQUEST = "Describe the image as a JSON object with the keys shape, color and number."
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle", "star"]},
        "color": {"enum": ["red", "green", "blue", "yellow"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["shape", "color", "number"],
    "additionalProperties": False,
}


def main() -> None:
    """Read the command line and compare."""
    options = _parser().parse_args()
    llm = LLM(options.model, device=options.device)
    report: dict[str, Any] = {"device": str(llm.model.device), "questions": options.count}
    for kind in options.kind or ONE_IMAGE:
        report[kind] = multiple_choice(llm, kind, options.count)
        print(f"{kind:12}", report[kind], flush=True)
    report["json"] = valid_json(llm, options.count)
    print(f"{'json':12}", report["json"])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def multiple_choice(llm: LLM, kind: str, count: int) -> dict[str, float]:
    """Return the shares of ``count`` questions of ``kind`` that are answered right, by constraint."""
    asked = [question_of_kind(kind, held_out_seed(kind, place)) for place in range(count)]
    wanted = [conversation.turns[0][1] for _, conversation in asked]
    every = sorted(set(wanted))
    constraints = []
    for place, answer in enumerate(wanted):
        others = [other for other in every if other != answer]
        chosen = random.Random(place).sample(others, min(_CHOICES - 1, len(others)))
        constraints.append(StructuredOutputsParams(choice=[answer, *chosen]))
    chats = []
    for (scene,), conversation in asked:
        chat = messages(conversation, [])
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part["image"] = render(scene)
        chats.append(chat)
    shares = {}
    for name, params in (
        ("free", _greedy()),
        ("choice", [_greedy(constraint) for constraint in constraints]),
    ):
        answers = [output.outputs[0].text.strip() for output in llm.chat(chats, params)]
        shares[name] = sum(map(str.__eq__, answers, wanted)) / count
    return shares


def valid_json(llm: LLM, count: int) -> dict[str, float]:
    """Return the shares of ``count`` answers that are JSON of ``SCHEMA``, by constraint."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(SCHEMA)
    chats = []
    for place in range(count):
        (scene,), _ = question_of_kind("describe", held_out_seed("describe", place))
        content = [{"type": "image", "image": render(scene)}, {"type": "text", "text": _REQUEST}]
        chats.append([{"role": "user", "content": content}])
    shares = {}
    for name, constraint in (("free", None), ("json", StructuredOutputsParams(json=SCHEMA))):
        outputs = llm.chat(chats, _greedy(constraint))
        shares[name] = sum(_follows(validator, o.outputs[0].text) for o in outputs) / count
    return shares


def _follows(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def _greedy(constraint: StructuredOutputsParams | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS, structured_outputs=constraint)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder of the checkpoint; the demo checkpoint unless given")
    add("--count", type=int, default=200, help="questions of each kind (default: %(default)s)")
    add("--kind", action="append", choices=ONE_IMAGE, help="only this kind; may be repeated")
    add("--device", default="auto")
    add("--json", type=Path, help="file for the numbers")
    return parser


if __name__ == "__main__":
    main()
