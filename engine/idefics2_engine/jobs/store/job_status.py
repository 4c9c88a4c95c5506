"""The progress of a job, read from its folder while it runs or afterwards."""

from pathlib import Path
from typing import NamedTuple

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_description import JobDescription, read_description
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.jobs.store.job_lock import Holder, read_holder
from idefics2_engine.jobs.store.job_outputs import WrittenOutput, read_outputs, recognize_output
from idefics2_engine.jobs.store.journal import journal_segments, scan_segments
from idefics2_engine.jobs.store.journal_index import JournalIndex
from idefics2_engine.model_files import printable_path


class JobStatus(NamedTuple):
    """A job's progress.

    Attributes:
        job: What the job was at its last start.
        holder: The process that runs it, if one does.
        rows: Rows in the journal.
        damaged: Damaged lines of the journal.
        finished: The complete output at its place.
    """

    job: JobDescription
    holder: Holder | None
    rows: int
    damaged: int
    finished: WrittenOutput | None


def read_status(out: Path) -> JobStatus:
    """Return the status of the job that writes ``out``, without locking or changing anything.

    Raises:
        JobError: There is no such job, or a file of it is damaged.
        OSError: A file cannot be read.
    """
    folder = job_path(out)
    if not folder.is_dir():
        raise JobError(
            f"there is no job for {printable_path(out)}: no folder {printable_path(folder)}"
        )
    job = read_description(folder)
    index = JournalIndex()
    damaged, _ = scan_segments(journal_segments(folder), FileOperations(), index)
    outputs = read_outputs(folder)
    own = recognize_output(out, outputs)
    finished = own if outputs and own == outputs[-1] else None
    return JobStatus(job, read_holder(folder), index.num_rows, damaged, finished)


def complete_output(out: Path, job: JobDescription) -> WrittenOutput | None:
    """Return the complete output at ``out`` if it is of exactly this job, without locking.

    An input without an identity may have changed, so its job is never known to be complete.
    """
    if same_job(out, job) is None:
        return None
    try:
        outputs = read_outputs(job_path(out))
    except JobError:
        return None
    own = recognize_output(out, outputs)
    return own if outputs and own == outputs[-1] else None


def same_job(out: Path, job: JobDescription) -> JobDescription | None:
    """Return the job as it was started last, if its fingerprint and its input are those of ``job``.

    An input without an identity is never known to be the same.
    """
    try:
        before = read_description(job_path(out))
    except JobError:
        return None
    is_same = before.fingerprint == job.fingerprint and before.inputs == job.inputs
    return before if job.inputs and is_same else None
