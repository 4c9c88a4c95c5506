"""The option ``--golden`` of ``idefics2 parity``, which compares answers with stored ones."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options, streams
from idefics2_engine.errors import ConfigError

if TYPE_CHECKING:
    from idefics2_engine.parity.golden.golden_check import GoldenComparison, GoldenResult

_DIFFERS = 1
# What options of comparisons are if they are not given
_ABSENT: dict[str, tuple[str, Any]] = {
    "b": ("B", None),
    "images": ("--image", []),
    "prompts": ("--prompt", []),
    "raw": ("--raw", False),
    "rows": ("--rows", None),
    "split": ("--split", None),
    "max_tokens": ("--max-tokens", 16),
    "inside": ("--inside", []),
    "bisect": ("--bisect", False),
    "float64": ("--no-float64", True),
    "ratio": ("--ratio", None),
    "bitwise": ("--bitwise", False),
    "save": ("--save", None),
    "digest": ("--digest", False),
    "report": ("--report", None),
    "svg": ("--svg", None),
}


def add_golden_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options to the group."""
    group.add_argument(
        "--golden",
        metavar="FILE",
        help="compare A's answers with those of a golden file: a file, or idefics2-8b or "
        "idefics2-8b-base for published answers",
    )
    group.add_argument(
        "--golden-images",
        metavar="DIR",
        type=Path,
        help="folder of its pictures (default: the file's folder)",
    )


def run_golden(args: argparse.Namespace) -> int:
    """Compare, print the result, and return the exit code.

    Raises:
        Idefics2Error: The path, the file, the model or an option is invalid.
    """
    for name, (option, absent) in _ABSENT.items():
        if getattr(args, name) != absent:
            raise ConfigError(
                f"--golden must come without B and options of comparisons, got {option}"
            )
    from idefics2_engine.cpu_threads import set_cpu_threads
    from idefics2_engine.parity import check_golden

    set_cpu_threads(options.model_folder(args.model), args.threads)
    result = check_golden(
        args.a,
        args.golden,
        images=args.golden_images,
        model=args.model,
        device=args.device,
        swap=args.swap,
    )
    if args.json:
        streams.print_json(result.to_dict())
    else:
        print("\n".join(golden_lines(result)))
    return 0 if result.passed else _DIFFERS


def golden_lines(comparison: "GoldenComparison") -> list[str]:
    """Return what was compared, a line for each case, and how many have the golden answer."""
    from idefics2_engine.cli.parity_table import path_line

    computed = [one for one in comparison.results if one.skipped is None]
    same = sum(one.parts_at is None for one in computed)
    return [
        path_line("A", comparison.a),
        *(f"{one.name}: {_outcome(one)}" for one in comparison.results),
        f"{same} of {len(computed)} answers are those of {comparison.golden}",
    ]


def _outcome(result: "GoldenResult") -> str:
    if result.skipped is not None:
        return f"skipped, {result.skipped}"
    if result.parts_at is None:
        return f"the same answer, {result.text!r}"
    own, golden = result.tokens
    what = "the end" if own is None else repr(own)
    wanted = f"wanted {golden!r}" if golden is not None else f"wanted {result.golden_text!r}"
    if result.golden_logprob is not None:
        wanted += f" with probability {math.exp(result.golden_logprob):.3g}"
    return f"parts at token {result.parts_at}, {wanted}, got {what}"
