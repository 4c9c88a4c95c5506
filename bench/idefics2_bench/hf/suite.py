"""Time transformers' classes on our operations beside transformers: ``idefics2 bench hf``.

    idefics2 bench hf --shrink 16  # the demo checkpoint
    idefics2 bench hf --random-weights tests/data/idefics2-8b --json h200-hf.json
    idefics2 bench hf --case generate-64x128 --no-peer-compile

Cases:

- ``prefill-4096``: a forward pass over a prompt, with the last logits alone
- ``images-mixed-16``, ``images-980-b8``: ``get_image_features``, from padded pixels
- ``memory-generate``: GB at the peak of ``generate-64x128``, beside weights and KV cache, on a GPU
- ``generate-64x128``: ``generate`` of 128 tokens after 64 prompts of 128, on the engine and in
  transformers' loop, beside transformers eager and compiled, and ``LLM``
- ``nf4-decode``: a token of one sequence with layers in NF4, beside bitsandbytes in transformers

Both sides have the same weights in the same memory, and are called as a user calls them, without
inference mode. transformers has SDPA attention, without cuDNN's in decode steps. With
``--peer-compile`` (the default on a GPU) it also generates with a static cache, which it compiles
for about a minute. Times are medians of ``--rounds``, in turns, after one call that is not timed.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from idefics2_bench import model_suite, transformers_peer
from idefics2_bench.hf.cases import CASES, GENERATE, MEMORY, NF4, Sizes
from idefics2_bench.hf.forwards import forward_rows
from idefics2_bench.hf.generating import generate_rows
from idefics2_bench.hf.memory import memory_obstacle, memory_rows
from idefics2_bench.hf.models import Models
from idefics2_bench.hf.nf4 import nf4_obstacle, nf4_rows
from idefics2_bench.offline import Results

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line.

    Returns:
        The exit code: 1 if a result was not finite, else 0.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    _check(options, parser)
    chosen = options.case or CASES
    results = Results(options.json, model_suite.about(options))
    models = Models.load(options)
    settings = model_suite.network_settings(models.packed, options)
    sizes = Sizes(options.shrink)
    for case in (case for case in CASES if case in chosen):
        if (obstacle := _obstacle(case, models)) is not None:
            print(f"{case}: {obstacle}: left out", file=sys.stderr)
            continue
        for row in _measured(case, models, sizes, options):
            results.add({"kernel": "hf", "case": sizes.name(case), **row, **settings})
    results.print_table(options)
    return int(any(not row.keys() & {"ms", "error", "beside_GB"} for row in results.rows))


def _obstacle(case: str, models: Models) -> str | None:
    """Return why ``case`` cannot run here, or ``None`` if it can."""
    if case == NF4:
        return nf4_obstacle()
    return memory_obstacle(models) if case == MEMORY else None


def _measured(case: str, models: Models, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """Return the rows of ``case``."""
    if case == MEMORY:
        return memory_rows(models, sizes.generate)
    if case == GENERATE:
        return generate_rows(models, sizes.generate, options.rounds, options.peer_compile)
    if case == NF4:
        return nf4_rows(models, sizes.decode, options.rounds)
    return forward_rows(case, models, sizes, options.ops, options.rounds)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that cannot be, and set the default of ``--peer-compile``."""
    if not transformers_peer.is_installed():
        parser.error("transformers must be installed, whose classes are timed")
    if options.quantization:
        parser.error(f"--quantization: case {NF4} quantizes, the others have dense weights")
    for name in ("shrink", "rounds"):
        number = getattr(options, name)
        if number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    on_gpu = options.device.startswith("cuda")
    if options.peer_compile and not on_gpu:
        parser.error("--peer-compile: transformers compiles on a GPU only")
    if options.peer_compile is None:
        options.peer_compile = on_gpu


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("hf", __doc__, has_peer=False)
    add = parser.add_argument
    add("--case", action="append", choices=CASES, help="only this case; may be repeated")
    add(
        "--rounds",
        type=int,
        default=3,
        help="timed rounds, whose median is kept (default: %(default)s)",
    )
    add(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide prompts, answers and images by N, for a small machine or model",
    )
    add(
        "--peer-compile",
        action=argparse.BooleanOptionalAction,
        help="time transformers' generate compiled as well, about a minute (default: on a GPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
