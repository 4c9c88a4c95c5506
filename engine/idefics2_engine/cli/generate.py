"""The command ``idefics2 generate``, which answers one question once or several times."""

import argparse
from math import isfinite
from time import perf_counter
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options, streams
from idefics2_engine.cli.log_output import add_log_options
from idefics2_engine.errors import PromptError, SamplingError

if TYPE_CHECKING:
    from idefics2_engine import LLM
    from idefics2_engine.outputs import CompletionOutput, RequestOutput


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="answer one question about images",
        description="Answer one question about any number of images.",
        allow_abbrev=False,
    )
    options.add_image_option(parser)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        required=True,
        help="the question; - reads it from standard input",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is, with <image> where each image goes, instead of "
        "chatting",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the answer while it is made")
    form.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object, one a line for each answer: text, token counts, finish_reason, "
        "seconds, model",
    )
    options.add_model_options(parser)
    group = options.add_sampling_options(parser)
    group.add_argument(
        "--n", metavar="N", type=int, default=1, help="answers to draw (default: %(default)s)"
    )
    group.add_argument(
        "--logprobs",
        metavar="K",
        type=int,
        help="with --json, report each token's log probability and those of the K likeliest",
    )
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answers and return the exit code.

    Raises:
        Idefics2Error: An option, the prompt or an image is invalid, or the request failed.
    """
    # Input is read before the model, so that an error is reported without loading it
    params = options.sampling_params(args, n=args.n, logprobs=args.logprobs)
    if args.stream and args.n > 1:
        raise SamplingError("--stream prints one answer: it must come without --n above 1")
    if args.logprobs is not None and not args.json:
        raise SamplingError("--logprobs must come with --json, which reports them")
    prompt = _prompt(args)
    options.import_engine()
    start = perf_counter()
    with options.loaded_llm(args, answers=args.n) as llm:
        loaded = perf_counter()
        ran = _ran(llm, args)
        first = None
        text = ""
        for output in llm.stream(prompt, params):
            first = first or perf_counter()
            if args.stream:
                print(output.outputs[0].text[len(text) :], end="", flush=True)
                text = output.outputs[0].text
        end = perf_counter()
    if args.json:
        seconds = {
            "load_seconds": round(loaded - start, 4),
            "first_token_seconds": round((first or end) - loaded, 4),
            "generate_seconds": round(end - loaded, 4),
        }
        for answer in output.outputs:
            streams.print_json(_answer_fields(output, answer, args) | seconds | ran)
    elif args.stream:
        print()
    else:
        print("\n\n".join(answer.text for answer in output.outputs))
    return 0


def _ran(llm: "LLM", args: argparse.Namespace) -> dict[str, str | None]:
    """Return the fields of ``--json`` about the model that answered."""
    return {
        "model": "demo" if args.model is None else str(args.model),
        "adapter": None if args.adapter is None else str(args.adapter),
        "quantization": "nf4" if llm.config.is_quantized else args.quantization,
        "device": str(llm.model.device),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
    }


def _answer_fields(
    output: "RequestOutput", answer: "CompletionOutput", args: argparse.Namespace
) -> dict[str, Any]:
    """Return the fields of ``--json`` about one answer, without the seconds and the model."""
    fields = {
        "index": answer.index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "images": len(args.images),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
    }
    if answer.logprobs is not None:
        fields["logprobs"] = [
            [
                {
                    "id": token,
                    "token": one.decoded_token,
                    # JSON has no infinity
                    "logprob": one.logprob if isfinite(one.logprob) else None,
                    "rank": one.rank,
                }
                for token, one in place.items()
            ]
            for place in answer.logprobs
        ]
    return fields


def _prompt(args: argparse.Namespace) -> Any:
    """Return a prompt for ``--raw``, and a conversation of one turn otherwise.

    Raises:
        PromptError: Standard input is named twice, or is not valid text.
        ImageError: An image cannot be read.
    """
    if [*args.images, args.prompt].count("-") > 1:
        raise PromptError(
            "- must stand for one --image or for the --prompt: there is one standard input"
        )
    images = [options.read_image(name, args) for name in args.images]
    text = streams.input_text() if args.prompt == "-" else args.prompt
    if args.raw:
        return {"prompt": text, "multi_modal_data": {"image": images}}
    image_parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*image_parts, {"type": "text", "text": text}]}]
