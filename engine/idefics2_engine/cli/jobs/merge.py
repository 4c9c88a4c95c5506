"""The command ``idefics2 merge``, which makes one output of the outputs of shards."""

import argparse
import sys
from pathlib import Path
from typing import Any

from idefics2_engine.cli.log_output import add_log_options
from idefics2_engine.jobs.merge import merge_shards
from idefics2_engine.model_files import printable_path


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "merge",
        help="make one output of the outputs of shards",
        description="Merge the outputs of all shards of a job (idefics2 run --shard i/n) to the "
        "output of the run without shards, byte for byte. Each shard's job folder must be beside "
        "its output.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "shards", metavar="SHARD", nargs="+", type=Path, help="the output of a shard, in any order"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="the merged output"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rename another output at OUT, and replace it"
    )
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, print the number of rows, and return the exit code.

    Raises:
        JobError: The shards do not make one job, or a file is in the way.
    """
    # The help needs none of what formats import
    from idefics2_engine.cli.jobs.format import format_of

    try:
        output = merge_shards(
            args.shards, args.output, format_of=format_of, overwrite=args.overwrite
        )
    except OSError as error:
        print(f"idefics2: error: the shards cannot be merged: {error}", file=sys.stderr)
        return 1
    print(f"{printable_path(args.output)}: {output.rows} rows of {len(args.shards)} shards")
    return 0
