"""The identity of a job's input files, and where its output must not be."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.model_files import printable_path

STAGED = "stdin"
"""Name of standard input in a job's folder, without the suffix of its format."""


class InputFile(NamedTuple):
    """A file of the input as it was found, without its content."""

    path: str
    size: int
    mtime_ns: int


class InputChange(NamedTuple):
    """What happened to an input file: ``grown``, ``changed``, ``added`` or ``removed``."""

    path: str
    kind: str


def is_staged(name: str) -> bool:
    """Return whether a file of this name in a job's folder is from standard input."""
    return name.startswith(f"{STAGED}.")


def as_mtime(digest: "hashlib._Hash") -> int:
    """Return a number in place of a time of change, for what has none that says enough."""
    # A time fits into 63 bits
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def identify_inputs(paths: Iterable[Path]) -> tuple[InputFile, ...]:
    """Return the identity of each file, in order.

    Raises:
        OSError: There is no such file.
    """
    found = ((path, os.stat(path)) for path in paths)
    return tuple(InputFile(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


def changed_inputs(before: Iterable[InputFile], now: Iterable[InputFile]) -> list[InputChange]:
    """Return the files that differ.

    A file that only grew may have new rows at its end. Whether its old rows are the same is known
    from their keys.
    """
    old, new = ({one.path: one for one in files} for files in (before, now))
    changes = []
    for path in [*new, *(path for path in old if path not in new)]:
        if path not in old:
            changes.append(InputChange(path, "added"))
        elif path not in new:
            changes.append(InputChange(path, "removed"))
        elif new[path].size > old[path].size:
            changes.append(InputChange(path, "grown"))
        elif new[path] != old[path]:
            changes.append(InputChange(path, "changed"))
    return changes


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise ``JobError`` if ``out`` is one of the inputs or is inside one, under any name."""
    # The file need not exist, and neither need the last folders
    places = [out, *out.absolute().parents, *out.resolve().parents]
    there = [os.stat(place) for place in places if place.exists()]
    for path in inputs:
        if any(os.path.samestat(os.stat(path), one) for one in there):
            raise JobError(
                f"{printable_path(out)}: the output must be apart from the input, "
                f"got the input {printable_path(path)}"
            )
