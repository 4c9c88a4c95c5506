"""The folder beside an output that makes its job resumable."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Self

from idefics2_engine.jobs.job_errors import FingerprintError, JobError
from idefics2_engine.jobs.store.file_operations import FileOperations, move_aside, replace_file
from idefics2_engine.jobs.store.fingerprint import difference_table, differences
from idefics2_engine.jobs.store.input_files import InputChange, changed_inputs, is_staged
from idefics2_engine.jobs.store.job_description import JOB_JSON, JobDescription, read_description
from idefics2_engine.jobs.store.job_lock import LOCK, JobLock
from idefics2_engine.jobs.store.job_outputs import (
    WrittenOutput,
    add_output,
    read_outputs,
    recognize_output,
)
from idefics2_engine.jobs.store.journal import journal_segments
from idefics2_engine.model_files import printable_path

# What a process that was killed before the job began may leave, beside standard input
_BEFORE_BEGIN = {LOCK, f"{JOB_JSON}.tmp"}


class JobFolder:
    """The locked folder ``OUT.job`` of the job that writes ``OUT``. It is a context manager.

    A new job gets a folder. A job that was begun is resumed if its fingerprint is the same. Nothing
    is deleted: what is in the way is renamed to ``NAME.1``, ``NAME.2`` and so on, or refused.

    Args:
        out: The output.
        job: What the job is now.
        restart: Move the old folder and what it wrote aside, and begin a new job.
        force_resume: Resume also if the fingerprint differs. ``job.json`` keeps the earlier one.
        overwrite: Move a file at ``out`` that no job wrote aside.
        files: Calls of the operating system.

    Attributes:
        out: The output.
        partial: The output while it is written.
        path: The folder, in which the journal is.
        job: What the job is now, with the fingerprints that were accepted before.
        input_changes: Input files that differ from those of the last start.
        finished: The output that is complete at ``out``, if this job made it.
        moved: What was moved aside, under its new names.

    Raises:
        JobInUseError: Another process runs the job.
        FingerprintError: The fingerprint differs, and rows were journalled. The message has a
            table.
        JobError: A file is in the way, or the folder is none of a job.
        OSError: A file cannot be read or written.
    """

    def __init__(
        self,
        out: Path,
        job: JobDescription,
        *,
        restart: bool = False,
        force_resume: bool = False,
        overwrite: bool = False,
        files: FileOperations | None = None,
    ) -> None:
        self.out = out
        self.partial = out.with_name(f"{out.name}.partial")
        self.path = job_path(out)
        self.job = job
        self.input_changes: list[InputChange] = []
        self.finished: WrittenOutput | None = None
        self.moved: list[Path] = []
        self._files = files or FileOperations()
        self._force_resume = force_resume
        self._overwrite = overwrite
        # JSON that cannot be written is an error before anything is
        job.encode()
        self._make_folder()
        self._lock = JobLock(self.path)
        try:
            if restart and not self._is_new():
                self._move_old_job()
            if self._is_new():
                self._begin()
            else:
                self._resume()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        """Return the folder."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Release the lock."""
        self.close()

    @property
    def has_journal(self) -> bool:
        """Whether rows were journalled. Those of a merged output are in the journals of its shards."""
        return any(path.stat().st_size for _, path in journal_segments(self.path))

    def publish(self, output: WrittenOutput) -> None:
        """Give the complete and synced ``partial`` its name.

        Raises:
            JobError: A file that this job did not make is there.
            OSError: A file cannot be renamed or synced. The next start does it again.
        """
        if os.path.lexists(self.out) and self._own_output() is None:
            raise JobError(
                f"{printable_path(self.out)}: must not exist, got a file that was made while the "
                f"job ran; the output is {printable_path(self.partial)}"
            )
        add_output(self._files, self.path, output)
        self._files.rename(self.partial, self.out)
        self._files.sync_folder(self.out.parent)
        self.finished = output

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        self._lock.release()

    def _make_folder(self) -> None:
        if os.path.lexists(self.path):
            return
        if not self.path.parent.is_dir():
            raise JobError(
                f"{printable_path(self.out)}: must be in an existing folder, "
                f"got {printable_path(self.path.parent)}"
            )
        self._files.make_folder(self.path)
        self._files.sync_folder(self.path.parent)

    def _is_new(self) -> bool:
        """Return whether no job was begun in the folder."""
        names = set(os.listdir(self.path)) - _BEFORE_BEGIN
        return all(is_staged(name) for name in names)

    def _has_rows(self) -> bool:
        """Return whether anything was journalled or written by the job."""
        return self.has_journal or bool(read_outputs(self.path))

    def _own_output(self) -> WrittenOutput | None:
        return recognize_output(self.out, read_outputs(self.path))

    def _move_old_job(self) -> None:
        """Move the old job's folder and what it wrote aside."""
        try:
            own = self._own_output()
        except JobError:
            # A damaged folder can be left as well, and then no output is known to be its own
            own = None
        if own is None and os.path.lexists(self.out):
            self._clear_output()
        for path in (self.out, self.partial):
            if os.path.lexists(path):
                self._move(path)
        old = self._lock
        try:
            # The old folder takes its lock with it, so that nobody else resumes in between
            self._move(self.path)
            self._make_folder()
            self._lock = JobLock(self.path)
        finally:
            if self._lock is not old:
                old.release()

    def _begin(self) -> None:
        if os.path.lexists(self.out):
            self._clear_output()
        # No job has written this one, and the job's own one replaces its earlier one
        if os.path.lexists(self.partial):
            self._move(self.partial)
        self._write_description()

    def _resume(self) -> None:
        before = read_description(self.path)
        accepted = before.accepted
        # Options may change until there is a row that depends on them
        if before.fingerprint != self.job.fingerprint and self._has_rows():
            if not self._force_resume:
                table = difference_table(differences(before.parts, self.job.parts))
                raise FingerprintError(
                    f"{printable_path(self.path)}: the job must be the one that was begun, got "
                    "another one (--force-resume continues, --restart begins again and keeps the "
                    f"folder):\n{table}"
                )
            accepted = (*accepted, before.parts)
        self.job = replace(self.job, accepted=accepted)
        self.input_changes = changed_inputs(before.inputs, self.job.inputs)
        outputs = read_outputs(self.path)
        own = recognize_output(self.out, outputs)
        if own is None and os.path.lexists(self.out):
            self._clear_output()
        if outputs and own == outputs[-1]:
            self.finished = own
        if self.job != before:
            self._write_description()

    def _clear_output(self) -> None:
        """Move a file at ``out`` that this job did not make aside, if that is allowed."""
        if not self._overwrite:
            raise JobError(
                f"{printable_path(self.out)}: must not exist, got a file that this job did not "
                "make; --overwrite moves it aside"
            )
        self._move(self.out)

    def _move(self, path: Path) -> None:
        self.moved.append(move_aside(self._files, path))

    def _write_description(self) -> None:
        replace_file(self._files, self.path / JOB_JSON, self.job.encode())


def job_path(out: Path) -> Path:
    """Return the folder of the job that writes ``out``."""
    return out.with_name(f"{out.name}.job")
