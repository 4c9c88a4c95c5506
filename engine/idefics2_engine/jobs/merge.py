"""Merging of the outputs of shards to the output of the whole job.

Row ``i`` of the whole is row ``i // n`` of shard ``i % n``. The bytes are those of the run without
shards.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.job_errors import FingerprintError, JobError, JobInUseError
from idefics2_engine.jobs.shard_rows import journal_rows, output_rows
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.fingerprint import difference_table, differences, fingerprint
from idefics2_engine.jobs.store.input_files import check_apart
from idefics2_engine.jobs.store.job_description import JobDescription, read_description
from idefics2_engine.jobs.store.job_folder import JobFolder, job_path
from idefics2_engine.jobs.store.job_lock import read_holder
from idefics2_engine.jobs.store.job_outputs import WrittenOutput, read_outputs, recognize_output
from idefics2_engine.jobs.writers.output_file import JsonlFormat, MakeFormat, OutputFile
from idefics2_engine.model_files import printable_path

_LINES = ".jsonl"
_WHOLE = [0, 1]

FormatOf = Callable[[Path, JobDescription], MakeFormat]
"""Returns what makes the format of an output, which is that of a job without shards."""


@dataclass(frozen=True)
class _Shard:
    """A finished shard: its output, its place among the shards, and its job."""

    out: Path
    index: int
    count: int
    job: JobDescription
    output: WrittenOutput

    @property
    def name(self) -> str:
        return f"shard {self.index}/{self.count}"

    def rows(self) -> Iterator[bytes]:
        """Yield the rows as the journal has them."""
        if self.out.name.endswith(_LINES) and _output_format(self.job) == "auto":
            return output_rows(self.out)
        return journal_rows(self.out, self.output.rows)


def merge_shards(
    shards: Sequence[Path],
    out: Path,
    *,
    format_of: FormatOf | None = None,
    overwrite: bool = False,
    files: FileOperations | None = None,
) -> WrittenOutput:
    """Write the rows of all shards to ``out``, which gets its name when it is complete.

    ``out`` gets a job folder without a journal, so that the run without shards knows it as its own.

    Args:
        shards: The outputs of all shards, in any order, with their job folders.
        out: The output.
        format_of: Returns the format of ``out``. If ``None``, rows are lines.
        overwrite: Move another output at ``out`` aside, with its job folder.
        files: Calls of the operating system.

    Raises:
        JobError: The shards are not all of one job or not finished, or ``out`` is in the way.
        OSError: A file cannot be read or written.
    """
    parts = _in_order([_read_shard(path) for path in shards])
    check_apart(out, shards)
    job = JobDescription(whole_parts(parts[0].job.parts), parts[0].job.inputs)
    make_format = JsonlFormat if format_of is None else format_of(out, _whole(parts[0].job))
    with _open_folder(out, job, overwrite, files) as folder:
        file = OutputFile(folder.partial, files)
        try:
            written = make_format(file)
            num_rows = 0
            for row in _merged_rows(parts):
                written.write_row(row)
                num_rows += 1
            written.finish()
            file.sync()
        finally:
            file.close()
        output = WrittenOutput(num_rows, file.size, file.sha256)
        folder.publish(output)
    return output


def whole_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the fingerprint of the run without shards."""
    return {**parts, "input": {**_input(parts), "shard": _WHOLE}}


def whole_fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the fingerprint of the run without shards, on which OpenAI's ids depend."""
    return fingerprint(whole_parts(parts))


def _input(parts: Mapping[str, Any]) -> Mapping[str, Any]:
    found = parts.get("input", {})
    return found if isinstance(found, Mapping) else {}


def _output_format(job: JobDescription) -> str:
    found = job.parts.get("output", {})
    return str(found.get("format", "auto")) if isinstance(found, Mapping) else "auto"


def _whole(job: JobDescription) -> JobDescription:
    return replace(job, parts=whole_parts(job.parts))


def _read_shard(out: Path) -> _Shard:
    """Return the shard that wrote ``out``, after checking that it is finished."""
    folder = job_path(out)
    if not folder.is_dir():
        raise JobError(
            f"{printable_path(out)}: must be the output of a job, got no {printable_path(folder)}"
        )
    job = read_description(folder)
    shard = _input(job.parts).get("shard")
    match shard:
        case [int(index), int(count)] if 0 <= index < count and count > 1:
            pass
        case _:
            raise JobError(
                f"{printable_path(out)}: must be the output of a shard (--shard), "
                f"got the shard {short_repr(shard)}"
            )
    if holder := read_holder(folder):
        raise JobInUseError(
            f"{printable_path(out)}: shard {index}/{count} must be finished, got it running in "
            f"process {holder.pid} on {holder.host}"
        )
    outputs = read_outputs(folder)
    found = recognize_output(out, outputs)
    if found is None or found != outputs[-1]:
        raise JobError(
            f"{printable_path(out)}: shard {index}/{count} must be finished and its output as it "
            "was written, got an unfinished one or another file"
        )
    return _Shard(out, index, count, job, found)


def _in_order(shards: list[_Shard]) -> list[_Shard]:
    """Return the shards by index, after checking that they are all of one job."""
    if not shards:
        raise JobError("the outputs of all shards must be named, got none")
    first = shards[0]
    by_index: dict[int, _Shard] = {}
    for shard in shards:
        _check_same_job(first, shard)
        if (other := by_index.setdefault(shard.index, shard)) is not shard:
            raise JobError(
                f"{shard.name} must be named once, got {printable_path(other.out)} and "
                f"{printable_path(shard.out)}"
            )
    if missing := [index for index in range(first.count) if index not in by_index]:
        raise JobError(
            f"all {first.count} shards must be named, got no "
            + ", ".join(f"{index}/{first.count}" for index in missing[:10])
        )
    ordered = [by_index[index] for index in range(first.count)]
    total = sum(shard.output.rows for shard in ordered)
    for shard in ordered:
        wanted = len(range(shard.index, total, shard.count))
        if shard.output.rows != wanted:
            raise JobError(
                f"{printable_path(shard.out)}: {shard.name} of {total} rows must have {wanted} "
                f"rows, got {shard.output.rows}; the shards had other inputs"
            )
    return ordered


def _check_same_job(first: _Shard, shard: _Shard) -> None:
    if found := differences(whole_parts(first.job.parts), whole_parts(shard.job.parts)):
        table = (
            difference_table(found).replace("journal", first.name, 1).replace("now", shard.name, 1)
        )
        raise FingerprintError(
            f"{printable_path(shard.out)}: must be of the same job as "
            f"{printable_path(first.out)}, got another one:\n{table}"
        )
    if shard.count != first.count:
        raise JobError(
            f"{printable_path(shard.out)}: must be one of {first.count} shards as "
            f"{printable_path(first.out)}, got one of {shard.count}"
        )
    # Another machine may have the files in another folder and copied them at another time
    sizes = [[(Path(one.path).name, one.size) for one in job.job.inputs] for job in (first, shard)]
    if sizes[0] != sizes[1]:
        raise JobError(
            f"{printable_path(shard.out)}: must have the input files of "
            f"{printable_path(first.out)}, got files of other names or sizes"
        )


def _open_folder(
    out: Path, job: JobDescription, overwrite: bool, files: FileOperations | None
) -> JobFolder:
    try:
        return JobFolder(out, job, overwrite=overwrite, files=files)
    except FingerprintError:
        if overwrite:
            return JobFolder(out, job, restart=True, overwrite=True, files=files)
        raise JobError(
            f"{printable_path(out)}: must be the output of the same job, got one of another job; "
            "--overwrite moves it aside"
        ) from None


def _merged_rows(shards: list[_Shard]) -> Iterator[bytes]:
    """Yield the rows of all shards, after checking that their numbers grow."""
    rows = [shard.rows() for shard in shards]
    before = -1
    for place in range(sum(shard.output.rows for shard in shards)):
        shard = shards[place % len(shards)]
        row = next(rows[shard.index], None)
        if row is None:
            raise JobError(f"{printable_path(shard.out)}: must have more rows, got its end")
        number = json.loads(row)["row"]
        if number <= before:
            raise JobError(
                f"{printable_path(shard.out)}: the row after {before} must have a larger number, "
                f"got {number}; the shards had other inputs"
            )
        before = number
        yield row
