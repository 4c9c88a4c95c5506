"""A whole job on its files with a stand-in for the model: an answer is a hash of its row.

As a program without torch, it runs jobs in forks of itself that are killed.
"""

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

from idefics2_engine.jobs.store.canonical_json import canonical_json, encode_row
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import JobFolder, job_path
from idefics2_engine.jobs.store.journal import Journal
from idefics2_engine.jobs.writers.ordered_writer import OrderedWriter
from idefics2_engine.jobs.writers.output_file import JsonlFormat, MakeFormat

SEGMENT_BYTES = 700


def row_key(row: str) -> str:
    return hashlib.sha256(canonical_json(row)).hexdigest()


def answer(number: int, row: str) -> bytes:
    text = hashlib.sha256(row.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return encode_row({"id": row, "row": number, "outputs": [{"text": f"{text} é\n"}], "p": 0.1})


def expected(rows: list[str]) -> bytes:
    return b"".join(answer(number, row) + b"\n" for number, row in enumerate(rows))


def run_job(
    out: Path,
    rows: list[str],
    *,
    files: FileOperations | None = None,
    parts: dict[str, Any] | None = None,
    seed: int = 0,
    window: int = 2,
    in_flight: int = 3,
    answer: Callable[[int, str], bytes] = answer,
    make_format: MakeFormat = JsonlFormat,
    **choices: bool,
) -> list[int]:
    """Run or resume a job; return the rows that were computed, in the order of finishing."""
    computed: list[int] = []
    rng = random.Random(seed)
    ticks = count()
    # It is late after every second or third record
    now = lambda: next(ticks) * 0.3  # noqa: E731
    with (
        JobFolder(out, JobDescription(parts or {}), files=files, **choices) as folder,
        Journal(folder.path, files=files, clock=now, segment_bytes=SEGMENT_BYTES) as journal,
        closing(
            OrderedWriter(
                folder.partial, journal, window=window, make_format=make_format, files=files
            )
        ) as writer,
    ):
        running: list[int] = []

        def finish(number: int) -> None:
            computed.append(number)
            out = answer(number, rows[number])
            writer.finish_row(number, journal.append(number, row_key(rows[number]), out), out)

        for number, row in enumerate(rows):
            if (record := journal.find(number, row_key(row))) is not None:
                writer.finish_row(number, record)
                continue
            running.append(number)
            if len(running) == in_flight:
                finish(running.pop(rng.randrange(in_flight)))
        for number in running:
            finish(number)
        output = writer.complete(len(rows))
        journal.sync()
        folder.publish(output)
    return computed


def journalled(folder: Path, rows: list[str]) -> set[int]:
    """Return the rows whose lines are whole, read without the code under test."""
    found = set()
    for path in folder.glob("journal-*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            body, _, end = line.rpartition(b',"crc":"')
            if end != b'%08x"}' % crc32(body):
                continue
            record = json.loads(line)
            if record["row"] < len(rows) and record["key"] == row_key(rows[record["row"]]):
                found.add(record["row"])
    return found


def num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("journal-*.jsonl"))


def kill_many(root: Path, kills: int) -> None:
    """Kill forks that run one job until ``kills`` of them are dead; start again when it is done."""
    from job_files import SignalledFiles

    rng = random.Random(0)
    rows = [f"row {number}" for number in range(40)]
    dead = jobs = 0
    while dead < kills:
        out = root / f"{jobs}.jsonl"
        files = SignalledFiles(rng.randrange(5, 60), rng.random())
        child = os.fork()
        if not child:
            run_job(out, rows, files=files, seed=dead)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            dead += 1
            continue
        assert status == 0
        assert out.read_bytes() == expected(rows)
        # A row that was journalled was not computed again
        assert num_lines(job_path(out)) == len(rows)
        jobs += 1
    print(json.dumps({"dead": dead, "jobs": jobs}))


if __name__ == "__main__":
    kill_many(Path(sys.argv[1]), int(sys.argv[2]))
