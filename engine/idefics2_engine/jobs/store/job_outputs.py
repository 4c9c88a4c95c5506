"""The list of outputs that a job made, by which it knows its own output from another file."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.file_operations import FileOperations, replace_file
from idefics2_engine.json_file import read_json_if_there
from idefics2_engine.model_files import printable_path

OUTPUTS_JSON = "outputs.json"


class WrittenOutput(NamedTuple):
    """A complete output: its rows, its bytes and their SHA-256 in hex."""

    rows: int
    size: int
    sha256: str


def read_outputs(folder: Path) -> list[WrittenOutput]:
    """Return the outputs of a job's folder, the newest last.

    Raises:
        JobError: The list is damaged.
    """
    path = folder / OUTPUTS_JSON
    try:
        return [WrittenOutput(**one) for one in read_json_if_there(path).get("outputs", [])]
    except (ConfigError, TypeError):
        raise JobError(f"{printable_path(path)}: must be as the job wrote it") from None


def add_output(files: FileOperations, folder: Path, output: WrittenOutput) -> None:
    """Add an output to the list, before it gets its name."""
    outputs = [one for one in read_outputs(folder) if one != output]
    content = {"v": 1, "outputs": [one._asdict() for one in [*outputs, output]]}
    replace_file(files, folder / OUTPUTS_JSON, json.dumps(content).encode("ascii") + b"\n")


def recognize_output(path: Path, outputs: list[WrittenOutput]) -> WrittenOutput | None:
    """Return which of ``outputs`` the file is, if it is one, by its content."""
    if path.is_symlink() or not path.is_file():
        return None
    size = path.stat().st_size
    alike = [one for one in outputs if one.size == size]
    if not alike:
        return None
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return next((one for one in alike if one.sha256 == sha256), None)
