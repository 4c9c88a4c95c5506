"""Which rows were in flight when a process died, in a file that outlives the process.

A process that is restarted with the same file knows which rows to run alone, and which row killed
it. It needs no other process that watches.
"""

import json
import os
from collections import Counter
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

# A row that was in flight at this many deaths runs alone
DEATHS_BEFORE_ALONE = 2


class Verdict(Enum):
    """How a row may run."""

    TOGETHER = "together"
    ALONE = "alone"
    LOST = "lost"


class DeathRecord:
    """The deaths of one worker, of which at most one process runs at a time.

    A row is known by a key, which is the same in every process. Several rows may have the same key.

    Args:
        path: The file. It is made if it is missing. If ``None``, nothing is recorded.

    Raises:
        OSError: The file cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self._deaths: Counter[str] = Counter()
        self._killers: set[str] = set()
        self._path = path
        self._file: int | None = None
        if path is not None:
            self._read(path)
            self._file = self._start(path)

    def verdict(self, key: str) -> Verdict:
        """Return how the row may run."""
        if key in self._killers:
            return Verdict.LOST
        return Verdict.ALONE if self._deaths[key] >= DEATHS_BEFORE_ALONE else Verdict.TOGETHER

    def begin(self, key: str, *, alone: bool = False) -> None:
        """Record that the row is in flight, before it can do any harm."""
        self._append("alone" if alone else "begin", key)

    def end(self, key: str, *, alone: bool = False) -> None:
        """Record that the row is no longer in flight. A row that survived alone is cleared."""
        if alone:
            del self._deaths[key]
        self._append("cleared" if alone else "end", key)

    def close(self) -> None:
        """Remove the file, because the work is done. A second call does nothing."""
        if self._file is not None and self._path is not None:
            os.close(self._file)
            self._file = None
            with suppress(FileNotFoundError):
                self._path.unlink()

    def _read(self, path: Path) -> None:
        """Replay the file. Rows that did not end were in flight when the process died."""
        in_flight: Counter[str] = Counter()
        alone: Counter[str] = Counter()
        with suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines():
                match _parsed(line):
                    case ["deaths", str(key), int(deaths)]:
                        self._deaths[key] = deaths
                    case ["killer", str(key)]:
                        self._killers.add(key)
                    case ["begin", str(key)]:
                        in_flight[key] += 1
                    case ["end", str(key)]:
                        in_flight[key] -= 1
                    case ["alone", str(key)]:
                        alone[key] += 1
                    case ["cleared", str(key)]:
                        alone[key] -= 1
                        del self._deaths[key]
        # The unary plus drops what is not positive
        self._deaths.update(set(+in_flight))
        self._killers.update(+alone)

    def _start(self, path: Path) -> int:
        """Replace the file by its summary, and open it for more."""
        lines = [["deaths", key, deaths] for key, deaths in self._deaths.items()]
        lines += [["killer", key] for key in self._killers]
        summary = path.with_name(f"{path.name}.{os.getpid()}")
        file = os.open(summary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        os.write(file, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        os.replace(summary, path)
        return file

    def _append(self, *line: str) -> None:
        # What a process wrote outlives it without a sync. Only a power failure could lose it.
        if self._file is not None:
            os.write(self._file, json.dumps(line).encode() + b"\n")


def _parsed(line: bytes) -> Any:
    """Return the JSON of a line, ``None`` for a line that was cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None
