"""``idefics2 generate``: one question, one answer."""

import argparse
import json
from time import perf_counter
from typing import Any

from idefics2_engine.cli import options


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="answer one question about images",
        description="Answer one question about any number of images.",
        allow_abbrev=False,
    )
    options.add_image_option(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the question")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is, with <image> where each image goes, instead of chatting",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the answer while it is made")
    form.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, token counts, finish_reason, seconds",
    )
    options.add_model_options(parser)
    options.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer and return the exit code."""
    params = options.sampling_params(
        args
    )  # before the model: a wrong input should not cost its loading
    prompt = _prompt(args)
    start = perf_counter()
    llm = options.load_llm(args)
    loaded = perf_counter()
    first = None
    text = ""
    for output in llm.stream(prompt, params):
        first = first or perf_counter()
        if args.stream:
            print(output.outputs[0].text[len(text) :], end="", flush=True)
        text = output.outputs[0].text
    end = perf_counter()
    if args.json:
        answer = output.outputs[0]
        print(
            json.dumps(
                {
                    "text": text,
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                    "images": len(args.images),
                    "prompt_tokens": len(output.prompt_token_ids),
                    "completion_tokens": len(answer.token_ids),
                    "load_seconds": round(loaded - start, 4),
                    "first_token_seconds": round((first or end) - loaded, 4),
                    "generate_seconds": round(end - loaded, 4),
                },
                ensure_ascii=False,
            )
        )
    else:
        print("" if args.stream else text)
    return 0


def _prompt(args: argparse.Namespace) -> Any:
    """Return the prompt for ``--raw``, a conversation of one turn otherwise."""
    images = [options.read_image(name, args) for name in args.images]
    if args.raw:
        return {"prompt": args.prompt, "multi_modal_data": {"image": images}}
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": args.prompt}]}]
