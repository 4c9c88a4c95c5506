"""The options of structured output, for commands that answer questions."""

import argparse
from pathlib import Path

from idefics2_engine.errors import SamplingError
from idefics2_engine.model_files import printable_path

# Far above the limit of a schema, whose error says more
_MOST_BYTES = 1 << 24


def add_structured_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options that ``structured_outputs`` reads."""
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--json-schema",
        metavar="FILE",
        help="answer in JSON that satisfies the schema in FILE",
    )
    one.add_argument("--regex", metavar="R", help="answer with a text that R matches whole")
    one.add_argument(
        "--choice",
        metavar="TEXT",
        action="append",
        default=[],
        help="answer with this text or another choice; repeatable",
    )
    one.add_argument(
        "--grammar", metavar="FILE", help="answer with a text of the Lark grammar in FILE"
    )


def structured_outputs(args: argparse.Namespace) -> dict[str, object] | None:
    """Return the fields of ``StructuredOutputsParams`` in ``args``; ``None`` if there are none.

    Raises:
        SamplingError: A file cannot be read.
    """
    if args.json_schema is not None:
        return {"json": _read("--json-schema", args.json_schema)}
    if args.regex is not None:
        return {"regex": args.regex}
    if args.choice:
        return {"choice": tuple(args.choice)}
    if args.grammar is not None:
        return {"grammar": _read("--grammar", args.grammar)}
    return None


def _read(option: str, name: str) -> str:
    path = Path(name)
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SamplingError(
            f"{option} must name a file in UTF-8, got {printable_path(path)}: {reason}"
        ) from None
