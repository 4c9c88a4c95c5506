"""``OUT.job/shadow.jsonl``: the answers' tokens of rows that may be compared, and what was found.

The tokens of a row are written before it is journalled, so a kill costs none. The file is not
synced: a loss of power may cost the last lines, and then these rows are not compared.
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.store.file_operations import APPEND, FileOperations, write_all

SHADOW = "shadow.jsonl"


class KnownAnswers(NamedTuple):
    """What a line says of a row."""

    answers: tuple[tuple[int, ...], ...]
    agreement: TokenAgreement | None


class ShadowFile:
    """Appends to the file in the job's folder, which this process has locked.

    Args:
        folder: The folder.
        fingerprint: The job's. Lines of another one are not used.
        files: Calls of the operating system.

    Attributes:
        known: What earlier runs wrote, by the place and the key of the row.

    Raises:
        OSError: The file cannot be read or written.
    """

    def __init__(self, folder: Path, fingerprint: str, files: FileOperations | None = None) -> None:
        self._files = files or FileOperations()
        self._fingerprint = fingerprint
        path = folder / SHADOW
        self._fd: int | None = self._files.open(path, APPEND | os.O_CREAT)
        size = self._files.size(self._fd)
        # A line that a kill cut off stays a line of its own
        if size and self._files.read_at(self._fd, 1, size - 1) != b"\n":
            write_all(self._files, self._fd, b"\n")
        self.known = _read(self._files.lines(path), fingerprint)

    def add(
        self,
        row: JobRow,
        answers: Sequence[Sequence[int]],
        agreement: TokenAgreement | None = None,
    ) -> None:
        """Append what is known of a row.

        Raises:
            OSError: The file cannot be written.
        """
        assert self._fd is not None
        line = encode_row(
            {
                "fingerprint": self._fingerprint,
                "row": row.index,
                "key": row.key,
                "answers": [list(ids) for ids in answers],
                "agreement": None if agreement is None else agreement.to_dict(),
            }
        )
        write_all(self._files, self._fd, line + b"\n")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._files.close(fd)


def _read(lines: Iterable[bytes], fingerprint: str) -> dict[tuple[int, str], KnownAnswers]:
    """Return what the lines of a job say. Of several lines of a row the last one counts."""
    known: dict[tuple[int, str], KnownAnswers] = {}
    for line in lines:
        # What a kill left of a line is none
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            if found["fingerprint"] != fingerprint:
                continue
            agreement = found["agreement"]
            known[found["row"], found["key"]] = KnownAnswers(
                tuple(tuple(map(int, ids)) for ids in found["answers"]),
                None if agreement is None else TokenAgreement(**agreement),
            )
    return known
