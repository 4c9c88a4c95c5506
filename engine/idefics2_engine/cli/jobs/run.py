"""The command ``idefics2 run``, which answers every row of a file."""

import argparse
from typing import Any

from idefics2_engine.cli.jobs import job_options, run_options
from idefics2_engine.cli.log_output import add_log_options

_EPILOG = """\
example:
  idefics2 run -i questions.jsonl -o answers.jsonl
  with lines such as {"id": "a1", "images": ["a.jpg"], "prompt": "What is this?"}

exit codes: 0 all rows are answered, 3 done and some are error rows, 1 the engine failed, 2 wrong
usage or input, or another job at OUT, 4 too many errors, 5 the output cannot be written, 130
interrupted. After 1, 4, 5, 130 and a kill the same command continues the job.
"""


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="answer every row of a file, resumably",
        description="Answer every row of a file of images and questions. Every row of the input "
        "gives one row of the output, in its order. A job that was killed is continued by the same "
        "command.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job_options.add_input_options(parser)
    run_options.add_run_options(parser)
    job_options.add_engine_options(parser)
    job_options.add_answer_options(parser)
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the job or print its status, and return the exit code.

    Raises:
        Idefics2Error: An option or the input is invalid, or the job cannot be begun or resumed.
    """
    # The help needs none of what a job imports
    from idefics2_engine.cli.jobs import run_job

    return run_job.run(args)
