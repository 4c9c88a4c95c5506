"""The command ``idefics2 parity``, which says at which stage two paths part."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options, streams
from idefics2_engine.cli.log_output import add_log_options
from idefics2_engine.cli.parity_golden import add_golden_options, run_golden
from idefics2_engine.errors import ConfigError

if TYPE_CHECKING:
    from idefics2_engine.parity import Case, Comparison

_DIFFERS = 1
_EPILOG = """\
a path is one of
  ours[:triton|:reference|:deterministic][:dtype][:nf4]   this engine, each case alone
  transformers[:sdpa|:eager][:dtype]                      transformers, unpatched
  float64                                                 the reference with A's weights
  DIR                                                     what --save has written
with bfloat16, float16 or float32 (bf16, fp16, fp32) for dtype

examples:
  idefics2 parity
  idefics2 parity ours:triton:bf16 transformers:bf16 --model HuggingFaceM4/idefics2-8b
  idefics2 parity --report parity.html
  idefics2 parity ours:reference --save before
  idefics2 parity ours:reference before --bitwise
  idefics2 parity ours:triton ours:reference --inside "text layer 2" --bisect

exit codes: 0 no difference beyond rounding, 1 a stage or a golden answer differs, 2 wrong usage or
input
"""


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "parity",
        help="compare two implementations stage by stage",
        description="Run the same inputs through two paths, and say at which stage they first part "
        "beyond rounding. A float64 leg tells rounding from differences.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", nargs="?", default="ours:reference", help="a path")
    parser.add_argument(
        "b",
        metavar="B",
        nargs="?",
        help="the path to compare it with (default: transformers; none with --save)",
    )
    _add_input_options(parser.add_argument_group("input"))
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        type=options.folder_or_hub_id,
        help="a checkpoint's folder, or its id on the hub (default: the demo checkpoint)",
    )
    group.add_argument(
        "--device",
        type=options.device,
        default="auto",
        help="auto (the default: a GPU if any), cpu, cuda, cuda:N",
    )
    group.add_argument(
        "--threads", metavar="N", type=options.positive, help="threads that compute on a CPU"
    )
    add_golden_options(parser.add_argument_group("golden answers"))
    _add_search_options(parser.add_argument_group("search"))
    _add_verdict_options(parser.add_argument_group("comparison"))
    _add_output_options(parser.add_argument_group("output"))
    add_log_options(parser)
    parser.set_defaults(run=run)


def _add_input_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--image",
        dest="images",
        metavar="FILE",
        action="append",
        default=[],
        help="an image of every prompt; repeat it for several, in order",
    )
    group.add_argument(
        "--prompt",
        dest="prompts",
        metavar="TEXT",
        action="append",
        default=[],
        help="a question; repeat it for several cases (default: 12 about the demo's pictures)",
    )
    group.add_argument(
        "--raw", action="store_true", help="continue prompts as they are, with <image> for images"
    )
    group.add_argument("--rows", metavar="FILE", type=Path, help="a file of rows, as jobs read it")
    group.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        help="also look at the four quarters of each image (default: what the checkpoint says)",
    )
    group.add_argument(
        "--max-tokens",
        metavar="N",
        type=options.positive,
        default=16,
        help="most tokens in an answer (default: %(default)s)",
    )


def _add_search_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--inside",
        metavar="LAYER",
        action="append",
        default=[],
        help="also compare the stages inside a layer, such as 'text layer 2', or inside all; "
        "repeat it for several",
    )
    group.add_argument(
        "--swap",
        metavar="OP",
        action="append",
        default=[],
        help="replace an operation of A, such as rms_norm, by the reference's; repeat it for "
        "several",
    )
    group.add_argument(
        "--bisect",
        action="store_true",
        help="find the operations of A that explain the differences",
    )


def _add_verdict_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--no-float64",
        dest="float64",
        action="store_false",
        help="leave out the float64 leg; stages that differ are then not judged",
    )
    group.add_argument(
        "--ratio",
        metavar="R",
        type=_ratio,
        help="times B's error that A's may have to be rounding (default: 2)",
    )
    group.add_argument(
        "--bitwise", action="store_true", help="exit with 1 unless all stages have the same bits"
    )
    group.add_argument("--save", metavar="DIR", type=Path, help="keep what A computed in DIR")
    group.add_argument(
        "--digest",
        action="store_true",
        help="keep only hashes, norms of rows and 64 elements of each tensor",
    )


def _add_output_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--json", action="store_true", help="print a JSON object, not a table")
    group.add_argument(
        "--report",
        metavar="FILE",
        type=_page,
        help="write an HTML page with heat maps of the worst cases, by tokens and by patches",
    )
    group.add_argument(
        "--svg", metavar="DIR", type=_folder, help="write the heat maps as SVG files, too"
    )


def _page(text: str) -> Path:
    """Return the path of a page, whose folder is checked before the paths run."""
    path = Path(text).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder or a new one, got the file {text!r}")
    return path


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0.0 < ratio < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return ratio


def run(args: argparse.Namespace) -> int:
    """Compare, print the result, and return the exit code.

    Raises:
        Idefics2Error: A path, an option, the model or an input is invalid.
    """
    if args.golden is not None:
        return run_golden(args)
    if args.digest and args.save is None:
        raise ConfigError("--digest must come with --save, got none")
    if args.bisect and args.save is not None and args.b is None:
        raise ConfigError("--bisect must come with a path B, got none")
    from idefics2_engine.cli.parity_table import comparison_lines
    from idefics2_engine.cpu_threads import set_cpu_threads
    from idefics2_engine.parity import Path as ParityPath
    from idefics2_engine.parity import compare
    from idefics2_engine.parity.inner_stages import stages_of
    from idefics2_engine.parity.recording.record import record

    path = ParityPath.parse(args.a)
    other = None if args.b is None else ParityPath.parse(args.b)
    cases = _cases(args)
    folder = options.model_folder(args.model)
    set_cpu_threads(folder, args.threads)
    if args.save is not None and other is None:
        if args.report is not None or args.svg is not None:
            raise ConfigError("--report and --svg must come with two paths, got one")
        recording = record(
            path,
            args.save,
            cases,
            folder,
            device=args.device,
            max_tokens=args.max_tokens,
            swap=args.swap,
            order=stages_of(folder, args.inside),
            digest=args.digest,
        )
        print(f"{args.save}: {len(recording.cases)} cases of {path}, {recording.dtype}")
        return 0
    given = {} if args.ratio is None else {"ratio": args.ratio}
    result = compare(
        path,
        other or "transformers",
        model=args.model,
        cases=cases,
        device=args.device,
        max_tokens=args.max_tokens,
        float64=args.float64,
        swap=args.swap,
        bisect=args.bisect,
        inside=args.inside,
        save=args.save,
        digest=args.digest,
        **given,
    )
    if args.json:
        streams.print_json(result.to_dict())
    else:
        print("\n".join(comparison_lines(result)))
    _write_files(args, result)
    passed = result.same_bits if args.bitwise else result.first_difference is None
    return 0 if passed else _DIFFERS


def _write_files(args: argparse.Namespace, result: "Comparison") -> None:
    """Write the page and the heat maps that ``args`` ask for.

    Raises:
        Idefics2Error: A file cannot be written.
    """
    from idefics2_engine.parity import write_heat_maps, write_report
    from idefics2_engine.parity.page.heat_maps import why_no_maps

    if args.report is not None:
        write_report(result, args.report)
    if args.svg is not None and not write_heat_maps(result, args.svg):
        print(f"idefics2: no heat maps were written: {why_no_maps(result)}", file=sys.stderr)


def _cases(args: argparse.Namespace) -> "list[Case]":
    """Return the inputs that ``args`` give."""
    from idefics2_engine.parity.inputs import Case, default_cases, row_cases

    if args.rows is not None:
        if args.images or args.prompts or args.raw:
            raise ConfigError("--rows must come without --image, --prompt and --raw, got both")
        return row_cases(args.rows, args.split)
    if not args.prompts:
        if args.images or args.raw or args.split is not None:
            raise ConfigError("--image, --raw and --split must come with --prompt, got none")
        return default_cases()
    make = Case.raw if args.raw else Case.question
    images = [Path(image).expanduser() for image in args.images]
    return [make(prompt, images, args.split) for prompt in args.prompts]
