"""Measure the demo checkpoint's accuracy on held-out questions, through ``LLM.chat``.

    PYTHONPATH=engine:kernels python examples/training/evaluate_demo.py --per-kind 1000

Answers are decoded greedily and compared letter by letter. In a conversation of two turns the
second question follows the model's own first answer, and both answers must be right. The scenes are
drawn from seeds that training never uses, with words from the list. The program prints a table.
``--json`` writes the numbers, and ``--card`` puts the table into the checkpoint's README.md.
"""

import argparse
import json
import time
from pathlib import Path

from conversations import held_out_seed, messages
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.demo import DEMO_MODEL
from questions import KINDS, Conversation, question_of_kind
from scenes import Scene, render

CARD_BEGIN, CARD_END = "<!-- accuracy -->\n", "<!-- /accuracy -->"
# Questions whose images are in memory at once
_AT_ONCE = 100
# The longest right answer has 60 tokens
_MAX_TOKENS = 96
# Wrong answers that are printed for each kind
_WRONG_SHOWN = 3


def main() -> None:
    """Read the command line and evaluate."""
    options = _parser().parse_args()
    llm = LLM(
        options.model,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        split_images=False if options.no_split else None,
    )
    began = time.monotonic()
    accuracy = {}
    for kind in options.kind or KINDS:
        right, wrong = evaluate_kind(llm, kind, options.per_kind)
        accuracy[kind] = right / options.per_kind
        print(f"{kind:12} {right:5} of {options.per_kind}  {accuracy[kind]:7.2%}", flush=True)
        for line in wrong[:_WRONG_SHOWN] if options.wrong else ():
            print(f"    {line}")
    overall = sum(accuracy.values()) / len(accuracy)
    print(f"{'overall':12} {overall:24.2%}  in {time.monotonic() - began:.0f} s")
    if options.json is not None:
        report = {
            "questions_per_kind": options.per_kind,
            "device": str(llm.model.device),
            "dtype": str(llm.model.dtype).removeprefix("torch."),
            "quantization": options.quantization,
            "split_images": not options.no_split,
            "exact_match": {**accuracy, "overall": overall},
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.card:
        write_card(Path(options.model or DEMO_MODEL) / "README.md", accuracy, overall)


def evaluate_kind(llm: LLM, kind: str, count: int) -> tuple[int, list[str]]:
    """Ask ``count`` held-out questions; return the number of right answers and the wrong ones."""
    right, wrong = 0, []
    for start in range(0, count, _AT_ONCE):
        asked = [
            question_of_kind(kind, held_out_seed(kind, place))
            for place in range(start, min(start + _AT_ONCE, count))
        ]
        for (_, conversation), answers in zip(asked, ask(llm, asked), strict=True):
            wanted = [answer for _, answer in conversation.turns]
            right += answers == wanted
            if answers != wanted:
                question = " / ".join(question for question, _ in conversation.turns)
                wrong.append(f"{question} wanted {wanted} got {answers}")
    return right, wrong


def ask(llm: LLM, asked: list[tuple[tuple[Scene, ...], Conversation]]) -> list[list[str]]:
    """Return the model's answers to every turn of conversations with equally many turns."""
    greedy = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
    drawn = [[render(scene) for scene in scenes] for scenes, _ in asked]
    answers: list[list[str]] = [[] for _ in asked]
    for _ in asked[0][1].turns:
        chats = []
        for images, (_, conversation), so_far in zip(drawn, asked, answers, strict=True):
            chat = messages(conversation, so_far)
            sources = iter(images)
            for part in chat[0]["content"]:
                if part["type"] == "image":
                    part["image"] = next(sources)
            chats.append(chat)
        for so_far, output in zip(answers, llm.chat(chats, greedy), strict=True):
            so_far.append(output.outputs[0].text.strip())
    return answers


def write_card(card: Path, accuracy: dict[str, float], overall: float) -> None:
    """Put the table of ``accuracy`` between the marks in the file ``card``."""
    text = card.read_text(encoding="utf-8")
    head, rest = text.split(CARD_BEGIN)
    _, tail = rest.split(CARD_END)
    rows = "".join(f"| {kind} | {share:.1%} |\n" for kind, share in accuracy.items())
    table = f"| questions | exact |\n|---|---|\n{rows}| **overall** | **{overall:.1%}** |\n"
    card.write_text(f"{head}{CARD_BEGIN}{table}{CARD_END}{tail}", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder of the checkpoint; the demo checkpoint unless given")
    add("--per-kind", type=int, default=1000, help="questions of each kind")
    add("--kind", action="append", choices=KINDS, help="only this kind; may be repeated")
    add("--no-split", action="store_true", help="show each image whole and not in quarters too")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--quantization", help="nf4 for layers in 4 bits; as the checkpoint is unless given")
    add("--json", type=Path, help="file for the numbers")
    add("--card", action="store_true", help="write the table into the checkpoint's README.md")
    add("--wrong", action="store_true", help="show some wrong answers")
    return parser


if __name__ == "__main__":
    main()
