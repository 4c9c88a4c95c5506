"""Answer every line of a JSONL file, and write the answers to another as they finish.

A line of the input is ``{"id": ..., "images": [path, ...], "question": text}``. A line of the
output is ``{"id": ..., "text": text, "finish_reason": reason}`` or ``{"id": ..., "error": {"code":
..., "message": ...}}``.

    python examples/batch_jsonl.py questions.jsonl answers.jsonl --model HuggingFaceM4/idefics2-8b
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

from idefics2_engine import LLM, SamplingParams


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation that asks a row's question about its images."""
    images = [{"type": "image", "image": path} for path in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["question"]}]}]


def prompts(lines: Iterable[str], ids: dict[str, Any]) -> Iterator[Any]:
    """Yield a prompt for each line, and note its id under its place in the file."""
    for place, line in enumerate(lines):
        ids[str(place)] = f"line {place + 1}"
        prompt = None
        try:
            row = json.loads(line)
            ids[str(place)] = row["id"]
            prompt = conversation(row)
        except (ValueError, KeyError, TypeError):
            # The engine rejects None as a prompt, so only this line of the file gets an error
            pass
        yield prompt


def main() -> None:
    """Read the command line and write the answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("questions", help="the JSONL file to read")
    parser.add_argument("answers", help="the JSONL file to write")
    parser.add_argument("--model", help="a folder or a hub id (default: the demo checkpoint)")
    parser.add_argument("--max-tokens", type=int, default=256, help="(default: %(default)s)")
    args = parser.parse_args()

    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    ids: dict[str, Any] = {}
    with (
        LLM(args.model) as llm,
        open(args.questions, encoding="utf-8") as lines,
        open(args.answers, "w", encoding="utf-8") as answers,
    ):
        # Outputs arrive in the order of finishing. request_id is the line's place in the file
        for output in llm.iterate(prompts(lines, ids), params, progress=True):
            result: dict[str, Any] = {"id": ids.pop(output.request_id)}
            if output.error is None:
                answer = output.outputs[0]
                result |= {"text": answer.text, "finish_reason": answer.finish_reason}
            else:
                result["error"] = output.error.to_dict()
            answers.write(json.dumps(result, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
