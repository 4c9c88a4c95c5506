"""Answer every line of a JSONL file, and write the answers to another as they finish.

A line of the input is ``{"id": ..., "images": [path, ...], "question": text}``, with all three keys.
A line of the output is ``{"id": ..., "text": text, "finish_reason": reason}`` or ``{"id": ...,
"error": {"code": ..., "message": ...}}``. The id of a line from which none can be read is ``line 3``
or so. If a line of the output has an error, the exit code is 1.

    python examples/batch_jsonl.py questions.jsonl answers.jsonl --model HuggingFaceM4/idefics2-8b
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import PromptError

KEYS = ("id", "images", "question")


def conversation(row: Any) -> list[dict[str, Any]]:
    """Return the conversation that asks a row's question about its images.

    Raises:
        PromptError: The row is no object, a key is missing, or ``images`` is no list.
    """
    if not isinstance(row, dict):
        raise PromptError(f"must be a JSON object, got {type(row).__name__}")
    if missing := [key for key in KEYS if key not in row]:
        raise PromptError(f"must have the keys {', '.join(KEYS)}, got no {', no '.join(missing)}")
    if not isinstance(row["images"], list):
        raise PromptError(f"images must be a list, got {type(row['images']).__name__}")
    images = [{"type": "image", "image": path} for path in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["question"]}]}]


def prompts(
    lines: Iterable[str], ids: dict[str, Any], errors: dict[str, PromptError]
) -> Iterator[Any]:
    """Yield a prompt for each line, and note its id or its error under its place in the file."""
    for index, line in enumerate(lines):
        place = str(index)
        ids[place] = f"line {index + 1}"
        prompt = None
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                ids[place] = row.get("id", ids[place])
            prompt = conversation(row)
        except PromptError as error:
            errors[place] = error
        except (ValueError, RecursionError) as error:
            errors[place] = PromptError(f"must be JSON: {error}")
        # The engine rejects None as a prompt, so only this line of the file gets an error
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
    errors: dict[str, PromptError] = {}
    failed = 0
    with (
        LLM(args.model) as llm,
        open(args.questions, encoding="utf-8") as lines,
        open(args.answers, "w", encoding="utf-8") as answers,
    ):
        # Outputs arrive in the order of finishing. request_id is the line's place in the file
        for output in llm.iterate(prompts(lines, ids, errors), params, progress=True):
            error = errors.pop(output.request_id, output.error)
            result: dict[str, Any] = {"id": ids.pop(output.request_id)}
            if error is None:
                answer = output.outputs[0]
                result |= {"text": answer.text, "finish_reason": answer.finish_reason}
            else:
                failed += 1
                result["error"] = error.to_dict()
            answers.write(json.dumps(result, ensure_ascii=False) + "\n")
    if failed:
        sys.exit(f"{failed} lines of {args.answers} have an error instead of a text")


if __name__ == "__main__":
    main()
