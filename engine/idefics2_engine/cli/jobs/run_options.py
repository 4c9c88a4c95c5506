"""The options of ``idefics2 run`` alone: output, resuming, limits, and who computes."""

import argparse
import re

from idefics2_engine.cli import options
from idefics2_engine.cli.jobs import job_options
from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.workers.worker_place import visible_devices
from idefics2_engine.runtime.config import default_num_seqs

_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_EVERY_CODE = ""
RAY_DEFAULT = "auto"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``run_options`` reads, and those of ``idefics2 run`` itself."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the output: .jsonl, .jsonl.gz, .jsonl.zst or .parquet; OUT.job is the job folder",
    )
    group.add_argument(
        "--output-format",
        choices=("auto", "openai"),
        default="auto",
        help="openai: result lines of OpenAI's batches (default: auto, by the name of OUT)",
    )
    group.add_argument(
        "--save",
        metavar="FIELD,…",
        default="",
        help="more fields of the output: token_ids, logprobs, prompt, image_info",
    )
    group.add_argument(
        "--on-incomplete",
        choices=("error", "keep"),
        default="error",
        help="what a row is whose answer has to satisfy a schema, a regex, choices or a grammar and "
        "is cut off by --max-tokens: the error 'structured' with its text (the default), or an "
        "answer",
    )
    group.add_argument(
        "--stats", action="store_true", help="write times and worker of each row to OUT.stats.jsonl"
    )
    group.add_argument(
        "--report", metavar="FILE", help="write a page with figures, images and answers"
    )
    group.add_argument(
        "--show",
        metavar="N",
        type=options.positive,
        default=0,
        help="print the first N questions and answers at the end",
    )
    group.add_argument(
        "--shadow",
        metavar="N|P%",
        help="at the end, compare N of the answered rows, or about P%% of them, with the reference "
        "path, one at least and otherwise for 2%% of the time; summary and report say how far they "
        "agree",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="rename a file at OUT that no job made, and replace it",
    )

    group = parser.add_argument_group("job")
    begin = group.add_mutually_exclusive_group()
    begin.add_argument(
        "--restart", action="store_true", help="rename the old job and its output, and begin again"
    )
    begin.add_argument(
        "--force-resume", action="store_true", help="continue although the model or options differ"
    )
    group.add_argument(
        "--retries",
        metavar="N",
        type=int,
        help="times that a row is computed again after request_failed, worker_lost or media_fetch "
        "(default: 1)",
    )
    group.add_argument(
        "--retry-errors",
        metavar="CODE,…",
        nargs="?",
        const=_EVERY_CODE,
        type=job_options.names,
        help="compute error rows of an earlier run again: all, or those with these codes",
    )
    group.add_argument(
        "--max-errors",
        metavar="N|P%",
        help="end the job when more rows than that are error rows, once it has 200 rows (default: "
        "never)",
    )
    group.add_argument(
        "--on-bad-row",
        choices=("error-row", "stop"),
        help="write an error row for a row that cannot be read (the default), or stop before the "
        "model is loaded",
    )
    group.add_argument(
        "--in-flight",
        metavar="N",
        type=int,
        help="rows that the engine has at once (default: twice --max-num-seqs, for each worker)",
    )
    group.add_argument(
        "--window",
        metavar="N",
        type=int,
        help="rows that are read ahead of the oldest unfinished one (default: 16 x --in-flight)",
    )
    group.add_argument(
        "--max-prepared-bytes",
        metavar="SIZE",
        type=size,
        help="limit of the memory of prepared images, such as 500MB (default: 2GiB)",
    )
    group.add_argument(
        "--drain-timeout",
        metavar="S",
        type=float,
        help="seconds that rows in flight get after the first Ctrl-C (default: 30)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="make saved log probabilities independent of other rows as well, on a CPU only",
    )
    group.add_argument(
        "--workers",
        metavar="N",
        help="processes or actors that compute; auto is one for each GPU (default: 1; auto with "
        "--ray)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const=RAY_DEFAULT,
        help="compute on actors of a Ray cluster (default: that of RAY_ADDRESS, one on this "
        "machine, or a new one)",
    )

    group = parser.add_argument_group("progress")
    group.add_argument(
        "--status",
        metavar="OUT",
        help="print how far the job that writes OUT is, and do nothing else",
    )
    group.add_argument(
        "--progress-interval",
        metavar="S",
        type=float,
        default=5.0,
        help="seconds between lines of progress where there is no terminal (default: 5)",
    )
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="form of logs and of lines of progress (default: %(default)s)",
    )


def run_options(args: argparse.Namespace, workers: int) -> JobOptions:
    """Return the options of the run; raise ``ConfigError`` if one is invalid."""
    values = job_options.given(args, JobOptions)
    if args.in_flight is None:
        at_once = args.max_num_seqs
        if at_once is None:
            on_gpu = args.device != "cpu" and (args.ray is not None or bool(visible_devices()))
            at_once = default_num_seqs(on_gpu=on_gpu)
        # A wrong number of sequences is the engine's error
        values["in_flight"] = 2 * max(1, at_once) * workers
    return JobOptions(**values)


def num_workers(args: argparse.Namespace) -> int | None:
    """Return the number of processes or actors that compute, ``None`` for one a GPU.

    Raises:
        ConfigError: It is no number.
    """
    if args.workers is None:
        return 1 if args.ray is None else None
    if args.workers == "auto":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,3}", args.workers):
        raise ConfigError(
            f"--workers must be auto or a number from 1 to 9999, got {short_repr(args.workers)}"
        )
    return int(args.workers)


def size(text: str) -> int:
    """Parse a number of bytes such as ``500MB`` or ``2GiB``.

    Raises:
        argparse.ArgumentTypeError: The text is not such a number.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected bytes such as 500MB or 2GiB, got {text!r}")
    step = 1024 if "i" in text.lower() else 1000
    power = " KMGT".index(found[2].upper() or " ")
    return int(found[1]) * int(step**power)
