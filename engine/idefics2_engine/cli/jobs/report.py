"""What ``idefics2 run`` says before and after a job, and about the job of another process."""

import errno
import json
import os
from pathlib import Path

from idefics2_engine.jobs.job_result import Ending, JobResult
from idefics2_engine.jobs.readers.validation import Validation
from idefics2_engine.jobs.shadow.shadow_figures import shadow_sentence
from idefics2_engine.jobs.store.job_status import JobStatus
from idefics2_engine.model_files import printable_path

_MOST_CHANGES = 5
# The end of the message of an image that is not there
_NO_FILE = os.strerror(errno.ENOENT).lower()
_RESUME = "the same command continues the job"


def validation_lines(validation: Validation, media_root: Path) -> list[str]:
    """Return what is wrong with the input, one line each; images are below ``media_root``."""
    lines = []
    if validation.num_bad:
        codes = ", ".join(f"{count} {code}" for code, count in validation.counts.items())
        lines.append(f"{validation.num_bad} of {validation.num_rows} rows are bad: {codes}")
        for row in validation.bad_rows:
            assert row.error is not None
            lines.append(f"  {row.place}: {row.error.code}: {row.error.message}")
        if validation.num_bad > len(validation.bad_rows):
            lines.append(f"  and {validation.num_bad - len(validation.bad_rows)} more")
        if any(row.error and row.error.message.endswith(_NO_FILE) for row in validation.bad_rows):
            lines.append(
                f"images are looked for in {printable_path(media_root)}; --media-root names another "
                "folder"
            )
    if validation.num_repeated:
        lines.append(f"{validation.num_repeated} rows have the id of an earlier row:")
        lines += [f"  {one.id!r}: {one.first} and {one.second}" for one in validation.repeated]
        if validation.num_repeated > len(validation.repeated):
            lines.append(f"  and {validation.num_repeated - len(validation.repeated)} more")
    lines += [f"column {name!r} of --keep is empty" for name in validation.empty_columns]
    return lines


def complete_lines(out: Path, rows: int, num_errors: int | None) -> list[str]:
    """Return that the job was complete before, with the number of its errors if it is known."""
    lines = [f"{printable_path(out)} is complete: {rows} rows"]
    if num_errors:
        lines[0] += f", {counted(num_errors, 'error')}; --retry-errors computes these again"
    return lines


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def result_lines(result: JobResult, out: Path, page: Path | None = None) -> list[str]:
    """Return how a run ended, in sentences, one line each; ``page`` is that of ``--report``."""
    counts, run = result.counts, result.run
    codes = ", ".join(f"{count} {code}" for code, count in sorted(counts.errors.items()))
    lines = [f"moved aside: {printable_path(path)}" for path in result.moved]
    lines += [
        # The size of a folder says little
        f"input {printable_path(Path(path))}: {'changed' if os.path.isdir(path) else kind} since "
        "the last start"
        for path, kind in result.input_changes[:_MOST_CHANGES]
    ]
    if (more := len(result.input_changes) - _MOST_CHANGES) > 0:
        lines.append(f"and {more} more inputs differ from those of the last start")
    if result.recovered.damaged:
        lines.append(f"{result.recovered.damaged} damaged lines of the journal were skipped")
    errors = counted(counts.num_errors, "error") + (f" ({codes})" if codes else "")
    if result.ending is Ending.COMPLETE:
        lines.append(f"{printable_path(out)} is complete: {counts.rows} rows, {errors}")
        if page is not None:
            lines.append(f"{printable_path(page)} shows the first rows")
    else:
        lines.append(f"the job ended: {result.message}")
        lines.append(f"{counts.rows} rows are finished, {errors}; {_RESUME}")
    if result.num_unchecked:
        lines.append(f"{result.num_unchecked} more rows in the journal were not looked at")
    before = result.from_journal
    rows = f"{before} rows were in the journal, {run.rows}" if before else f"{run.rows} rows"
    lines.append(
        f"{rows} were finished in {result.seconds:.1f} s: {run.images} images, "
        f"{run.prompt_tokens} prompt tokens, {run.completion_tokens} new tokens"
    )
    if run.computed:
        lines.append(result.waits.sentence())
    if result.ending is Ending.COMPLETE and result.shadow is not None:
        assert result.shadow_run is not None
        lines.append(f"reference path: {shadow_sentence(result.shadow, result.shadow_run)}")
    if (advice := result.waits.advice()) is not None:
        lines.append(advice)
    return lines


def status_lines(status: JobStatus, out: Path, *, as_json: bool) -> list[str]:
    """Return the progress of a job that runs or has ended."""
    total = status.job.options.get("rows")
    if as_json:
        holder = None if status.holder is None else status.holder._asdict()
        return [
            json.dumps(
                {
                    "event": "status",
                    "output": os.fspath(out),
                    "rows": status.rows,
                    "of": total,
                    "complete": status.finished is not None,
                    "damaged": status.damaged,
                    "running": holder,
                }
            )
        ]
    of = "" if total is None else f" of {total}"
    if status.finished is not None:
        state = f"complete with {status.finished.rows} rows"
    elif status.holder is not None:
        state = f"running as process {status.holder.pid} on {status.holder.host}"
    else:
        state = "stopped"
    lines = [
        f"{printable_path(out)}: {status.rows}{of} rows are in the journal, the job is {state}"
    ]
    if status.damaged:
        lines.append(
            f"{status.damaged} lines of the journal are damaged and will be computed again"
        )
    return lines
