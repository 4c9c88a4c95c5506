"""Jobs of one shard with a stand-in for the model, for tests of merging."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.store.input_files import identify_inputs
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import JobFolder
from idefics2_engine.jobs.store.journal import Journal
from idefics2_engine.jobs.writers.ordered_writer import OrderedWriter
from idefics2_engine.jobs.writers.output_file import JsonlFormat, MakeFormat

ROWS = 23


def short_row(number: int, text: str) -> bytes:
    return encode_row({"id": f"é{number}", "row": number, "text": f"{text}{number}"})


def key_of(number: int, text: str) -> str:
    return hashlib.sha256(f"{number} {text}".encode()).hexdigest()


def run_shard(
    out: Path,
    index: int = 0,
    count: int = 1,
    *,
    rows: int = ROWS,
    numbers: range | None = None,
    text: str = "",
    make_row: Callable[[int, str], bytes] = short_row,
    make_format: MakeFormat = JsonlFormat,
    inputs: tuple[Path, ...] = (),
    finish: bool = True,
    **parts: Any,
) -> Path:
    """Run a job with rows that finish in reverse order, and resume it if it was begun."""
    parts = {"seed": 3, "input": {"limit": None, "shard": [index, count]}, **parts}
    numbers = range(index, rows, count) if numbers is None else numbers
    job = JobDescription(parts, identify_inputs(inputs), {"model": "demo"})
    with (
        JobFolder(out, job) as folder,
        Journal(folder.path, segment_bytes=300) as journal,
        closing(
            OrderedWriter(folder.partial, journal, window=3, make_format=make_format)
        ) as writer,
    ):
        for place, number in reversed(list(enumerate(numbers))):
            row = make_row(number, text)
            key = key_of(number, text)
            record = journal.find(place, key)
            writer.finish_row(
                place, journal.append(place, key, row) if record is None else record, row
            )
        journal.sync()
        if finish:
            folder.publish(writer.complete(len(numbers)))
    return out


def run_shards(folder: Path, count: int, name: str = "out.jsonl", **options: Any) -> list[Path]:
    return [
        run_shard(folder / f"{index}-{name}", index, count, **options) for index in range(count)
    ]
