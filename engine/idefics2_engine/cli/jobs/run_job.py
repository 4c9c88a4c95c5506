"""What ``idefics2 run`` does once its options are parsed."""

import argparse
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from idefics2_engine.cli.jobs import job_options, report, run_options
from idefics2_engine.cli.jobs.check import check_input, checked_before
from idefics2_engine.cli.jobs.engine import EngineChoice
from idefics2_engine.cli.jobs.files import FilesBeside
from idefics2_engine.cli.jobs.fingerprint import device_name, fingerprint_parts
from idefics2_engine.cli.jobs.format import format_of
from idefics2_engine.cli.jobs.progress import JobProgress, JobTotals
from idefics2_engine.cli.jobs.signals import interrupts_handled
from idefics2_engine.cli.streams import StandardOutputError
from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError, input_lost
from idefics2_engine.jobs.job_result import Ending, JobResult
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.staged_input import STDIN, with_staged_input
from idefics2_engine.jobs.row_encoding import OutputEncoding
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.shadow.shadow_rows import ShadowRows
from idefics2_engine.jobs.shadow.shadow_size import shadow_size
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.jobs.store.job_lock import JobLock
from idefics2_engine.jobs.store.job_status import complete_output, read_status
from idefics2_engine.jobs.workers.worker_pool import WorkerPoolError
from idefics2_engine.jobs.writers.formats import saved_fields
from idefics2_engine.model_files import printable_path

_INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Run the job or print its status, and return the exit code.

    Raises:
        Idefics2Error: An option or the input is invalid, or the job cannot be begun or resumed.
    """
    as_json = args.log_format == "json"
    if args.status is not None:
        out = Path(args.status)
        _say(report.status_lines(read_status(out), out, as_json=as_json))
        return 0
    if not args.inputs or not args.output:
        raise ConfigError("a job must have an input and an output: -i IN -o OUT")
    out = Path(args.output)
    try:
        return _run(args, out)
    except KeyboardInterrupt:
        print("idefics2: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except WorkerPoolError as error:
        print(f"idefics2: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        raise input_lost(error) from error


def _run(args: argparse.Namespace, out: Path) -> int:
    given = _with_stdin(job_options.input_options(args), out, args)
    params = job_options.job_sampling(args)
    job_input = JobInput(given, params)
    save = saved_fields(args.save, args.output_format, given.keep)
    engine = EngineChoice(args, job_input)
    options = run_options.run_options(args, engine.workers)
    size = None if args.shadow is None else shadow_size(args.shadow)
    parts = fingerprint_parts(args, job_input, params, save)
    model = "demo" if args.model is None else str(args.model)
    job = JobDescription(parts, job_input.identify(), {"model": model})
    encoding = OutputEncoding(save, format_of(out, job), job_input.media_root, args.on_incomplete)
    shadow = None
    if size is not None:
        shadow = ShadowRows(
            out,
            size,
            seed=args.seed or 0,
            fingerprint=job.fingerprint,
            same_operations=_is_reference(args),
        )
    files_beside = FilesBeside(args, out, job_input.media_root, save, engine.workers)
    is_described = files_beside.are_there
    begins_again = options.restart or options.retry_errors is not None or not is_described
    complete = None if begins_again else complete_output(out, job)
    # The rows of a complete job were checked before
    if complete is not None:
        totals = JobTotals(complete.rows, None)
    elif (known := checked_before(args, job)) is not None:
        totals = known
        print("idefics2: the input is the one that was checked before", file=sys.stderr)
    else:
        validation, totals, lacks_images = check_input(args, job_input)
        lines = report.validation_lines(validation, job_input.media_root)
        if lacks_images and validation.num_rows > validation.num_bad:
            lines.append("no row of the table has an image; --image-column names their column")
        for line in lines:
            print(f"idefics2: {line}", file=sys.stderr)
        must_stop = validation.num_bad and options.on_bad_row == "stop"
        if must_stop or validation.num_repeated:
            return 2
    checked = {"rows": totals.rows, "answer_tokens": totals.answer_tokens}
    checked["check_images"] = args.check_images
    job = replace(job, options={**checked, "model": model})
    progress = JobProgress(
        totals, interval=args.progress_interval, as_json=args.log_format == "json"
    )
    runner = JobRunner(
        out,
        job_input,
        engine,
        encoding,
        job,
        options,
        observers=[progress, *files_beside.observers],
        shadow=shadow,
        on_complete=files_beside.write,
        is_described=is_described,
    )
    with interrupts_handled(runner.interrupt):
        result = runner.run()
    if table := files_beside.table():
        _say([*table, ""])
    result = replace(result, moved=(*result.moved, *files_beside.moved))
    if result.ending is Ending.COMPLETE_BEFORE:
        lines = report.complete_lines(out, result.counts.rows, files_beside.num_errors())
        if shadow is not None:
            lines.append("--shadow has no effect on a complete job; --restart computes it again")
        _say(lines)
    else:
        _tell(result, out, None if args.report is None else Path(args.report))
    return result.exit_code


def _is_reference(args: argparse.Namespace) -> bool:
    """Return whether the engine's operations are the reference, which they are on a CPU."""
    # The actors of a cluster may have other devices than this machine
    name = args.device if args.ray is not None else device_name(args)
    return name == "cpu" and not args.deterministic


def _with_stdin(options: InputOptions, out: Path, args: argparse.Namespace) -> InputOptions:
    """Return the options with standard input as a file of the job's folder."""
    if STDIN not in options.inputs:
        return options
    if args.restart:
        raise ConfigError(
            "--restart must come with a file as input, got standard input, which is kept in the "
            "folder that is moved aside; save it to a file first"
        )
    folder = job_path(out)
    if not folder.parent.is_dir():
        raise JobError(
            f"{printable_path(out)}: must be in an existing folder, "
            f"got {printable_path(folder.parent)}"
        )
    folder.mkdir(exist_ok=True)
    # Another runner must not read the file meanwhile
    with ExitStack() as stack:
        stack.callback(JobLock(folder).release)
        return with_staged_input(options, folder)


def _tell(result: JobResult, out: Path, page: Path | None) -> None:
    """Say how the run ended: on standard error if it is not complete."""
    lines = report.result_lines(result, out, page)
    if result.message:
        for line in lines:
            print(f"idefics2: {line}", file=sys.stderr)
    else:
        _say(lines)


def _say(lines: list[str]) -> None:
    """Print lines to standard output. A closed one is no error, because the output is a file."""
    with suppress(StandardOutputError):
        print("\n".join(lines), flush=True)
