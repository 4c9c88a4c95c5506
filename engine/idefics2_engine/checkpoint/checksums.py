"""Verification of a folder's files by their published checksums.

A file must agree with every checksum that exists for it. There are three sources:

- ``SHA256SUMS`` and ``*.sha256`` files in the folder;
- the hub's cache, where a file is a link to a blob named by its checksum;
- the metadata that the hub's client writes beside a download into a folder.

The hub's checksum is sha256 for large files and git's blob hash for others.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from idefics2_engine.errors import CheckpointError
from idefics2_engine.json_file import printable
from idefics2_engine.model_files import is_there, open_file, paths_in, printable_path, read_text

_logger = logging.getLogger(__name__)
_NOTES = Path(".cache/huggingface/download")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_SUM_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *](?:\./)?(\S.*))?")


@dataclass(frozen=True)
class _Sum:
    """The expected checksum of a file and its source.

    A ``digest`` of 64 hexadecimal digits is sha256. One of 40 digits is git's blob hash.
    """

    digest: str
    source: str


def verify_files(folder: Path, weights: Iterable[Path]) -> None:
    """Compare the files of ``folder`` with their published checksums.

    Args:
        folder: Folder of a checkpoint or an adapter.
        weights: Files of ``folder`` that must have a checksum. JSON files and chat templates are
            compared if they have one.

    Raises:
        CheckpointError: A file differs or is unreadable, a weight file has no checksum, or a sums
            file is malformed.
    """
    weights = set(weights)
    texts = paths_in(folder, "*.json", "*.jinja", error=CheckpointError)
    expected = _published(folder, weights.union(texts))
    unknown = sorted(weights - {file for file, _ in expected})
    if unknown:
        raise CheckpointError(
            f"{printable_path(unknown[0])}: has no checksum to be compared with: wanted is a SHA256SUMS or *.sha256 file in its folder that "
            "names it, or a download from the hub"
        )
    # Threads hash in parallel, because hashlib releases the GIL
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda pair: _digest(pair[0], len(pair[1].digest)), expected))
    wrong = [
        f"{printable_path(file)}: checksum must be {wanted.digest} ({wanted.source}), got {got}"
        for (file, wanted), got in zip(expected, found, strict=True)
        if got != wanted.digest
    ]
    if wrong:
        raise CheckpointError("; ".join(wrong))
    files = len({file for file, _ in expected})
    _logger.info("%s: %d files have their published checksums", printable_path(folder), files)


def known_checksums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the published checksums of ``files`` in ``folder`` by name, without comparing them.

    Raises:
        CheckpointError: A sums file is malformed.
    """
    return {file.name: wanted.digest for file, wanted in reversed(_published(folder, files))}


def _published(folder: Path, files: Iterable[Path]) -> list[tuple[Path, _Sum]]:
    """Return the published checksums of ``files``, of which a file may have several."""
    sums = _sums_files(folder)
    return [
        (file, wanted)
        for file in sorted(files)
        for wanted in (*sums.get(file.name, ()), *_cache_sums(file), *_note_sums(file))
    ]


def _digest(file: Path, length: int) -> str:
    """Return the checksum of ``file``: sha256 if ``length`` is 64 digits, else git's blob hash."""
    with open_file(file, CheckpointError) as (opened, size):
        if length == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.file_digest(opened, lambda: blob).hexdigest()


def _sums_files(folder: Path) -> dict[str, list[_Sum]]:
    """Return the checksums in the sums files of ``folder`` by file name."""
    sums: dict[str, list[_Sum]] = {}
    for path in paths_in(folder, "SHA256SUMS", "*.sha256", error=CheckpointError):
        lines = read_text(path, CheckpointError).splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _SUM_LINE.fullmatch(line.rstrip())
            alone = path.name.removesuffix(".sha256") if path.suffix == ".sha256" else None
            name = match and (match[2] or alone)
            if not match or not name:
                raise CheckpointError(
                    f"{printable_path(path)}: line {number} must be 64 hexadecimal digits and a file's name, got {line[:80]!r}"
                )
            sums.setdefault(name, []).append(_Sum(match[1].lower(), printable(path.name)))
    return sums


def _cache_sums(file: Path) -> list[_Sum]:
    """Return the name of the blob that ``file`` links to in the hub's cache, if it does."""
    if not os.path.islink(file):
        return []
    # Path.resolve raises on a link to itself
    blob = Path(os.path.realpath(file))
    return (
        _hub_sums(blob.name, "its name in the hub's cache") if blob.parent.name == "blobs" else []
    )


def _note_sums(file: Path) -> list[_Sum]:
    """Return the checksum that the hub's client recorded when it downloaded ``file``."""
    note = file.parent / _NOTES / f"{file.name}.metadata"
    if not is_there(note):
        return []
    lines = read_text(note, CheckpointError).splitlines()
    return _hub_sums(lines[1].strip(), printable(str(_NOTES / note.name))) if len(lines) > 1 else []


def _hub_sums(digest: str, source: str) -> list[_Sum]:
    known = _SHA256.fullmatch(digest) or _GIT_SHA1.fullmatch(digest)
    return [_Sum(digest, source)] if known else []
