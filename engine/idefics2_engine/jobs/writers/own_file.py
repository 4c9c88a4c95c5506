"""Files beside an output, each of which replaces only its own earlier version."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idefics2_engine.jobs.store.file_operations import FileOperations, move_aside, replace_file

# The mark is at the beginning of a file
_MARK_WITHIN = 4096


def beside(out: Path, kind: str) -> Path:
    """Return the file of a kind that belongs to an output, such as ``OUT.summary.json``."""
    return out.with_name(f"{out.name}.{kind}")


def replace_own_file(files: FileOperations, path: Path, data: bytes, mark: bytes) -> Path | None:
    """Write ``data`` as ``replace_file`` does, and move a file of another job aside.

    Args:
        files: Calls of the operating system.
        path: The file.
        data: Its content, which begins with ``mark`` or has it close to its beginning.
        mark: What only files of this kind and job have.

    Returns:
        The new name of the file that was moved aside.

    Raises:
        OSError: A file cannot be written or moved.
    """
    assert mark in data[:_MARK_WITHIN]
    moved = None
    if os.path.lexists(path) and not _has_mark(path, mark):
        moved = move_aside(files, path)
    replace_file(files, path, data)
    return moved


def write_json_beside(
    out: Path,
    kind: str,
    fingerprint: str,
    content: Mapping[str, Any],
    files: FileOperations | None = None,
) -> Path | None:
    """Write ``OUT.<kind>.json`` at once, which begins with the job's fingerprint.

    Args:
        out: The output.
        kind: ``summary`` or ``manifest``.
        fingerprint: The job's.
        content: JSON data.
        files: Calls of the operating system.

    Returns:
        The new name of a file of another job that was moved aside.

    Raises:
        OSError: A file cannot be written or moved.
        ValueError: A number is not finite.
        TypeError: A value has no JSON.
    """
    head = {"kind": f"idefics2 job {kind}", "fingerprint": fingerprint}
    mark = json.dumps(head, indent=1).encode().removesuffix(b"\n}")
    data = json.dumps({**head, **content}, indent=1, allow_nan=False, ensure_ascii=True).encode()
    path = beside(out, f"{kind}.json")
    return replace_own_file(files or FileOperations(), path, data + b"\n", mark)


def _has_mark(path: Path, mark: bytes) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark in file.read(_MARK_WITHIN)
