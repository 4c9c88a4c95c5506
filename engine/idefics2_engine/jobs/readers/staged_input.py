"""Standard input as a file in the job's folder, because a job reads its input several times."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.model_files import paths_in, printable_path

STDIN = "-"
_NAME = "stdin"
_PART = "part"
_AT_ONCE = 1 << 20
# First bytes of files whose format is not said
_MAGIC = {b"\x1f\x8b": "jsonl.gz", b"\x28\xb5\x2f\xfd": "jsonl.zst", b"PAR1": "parquet"}
_SUFFIXES = {"parquet": "parquet", "csv": "csv", "webdataset": "tar"}


def is_staged(name: str) -> bool:
    """Return whether a file of this name in a job's folder is from standard input."""
    return name.startswith(f"{_NAME}.")


def with_staged_input(options: InputOptions, folder: Path) -> InputOptions:
    """Return the options with standard input, if they name it, as a file in ``folder``.

    Its images are below the folder of the process unless the options say otherwise.

    Raises:
        ConfigError: As in ``stage_stdin``, or standard input is named for images.
        OSError: A file cannot be written.
    """
    if STDIN not in options.inputs:
        return options
    if options.input_format == "images":
        raise ConfigError("inputs: images must be files, got standard input")
    path = stage_stdin(folder, options.input_format)
    inputs = tuple(str(path) if name == STDIN else name for name in options.inputs)
    return replace(options, inputs=inputs, media_root=options.media_root or Path.cwd())


def stage_stdin(folder: Path, input_format: str = "auto", stream: BinaryIO | None = None) -> Path:
    """Write standard input to a file in ``folder``, and return its path.

    A job that is resumed finds its file again. It may then get nothing on standard input, the same,
    or the same with more at the end.

    Args:
        folder: An existing folder.
        input_format: One of ``FORMATS``.
        stream: Where to read. If ``None``, standard input.

    Raises:
        ConfigError: The file is there and has other content, or there is nothing to read.
        OSError: A file cannot be written.
    """
    part = folder / f"{_NAME}.{_PART}"
    before = [path for path in paths_in(folder, f"{_NAME}.*") if path != part]
    with open(part, "wb") as file:
        for chunk in _chunks(sys.stdin.buffer if stream is None else stream):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if not part.stat().st_size:
        part.unlink()
        if not before:
            raise ConfigError("inputs: standard input must have rows, got nothing")
        return before[0]
    if before and not _begins_with(part, before[0]):
        part.unlink()
        raise ConfigError(
            f"inputs: standard input must begin like {printable_path(before[0])}, with which the "
            "job began, got something else"
        )
    path = before[0] if before else folder / f"{_NAME}.{_suffix(part, input_format)}"
    os.replace(part, path)
    return path


def _suffix(path: Path, input_format: str) -> str:
    with open(path, "rb") as file:
        first = file.read(4)
    if input_format in _SUFFIXES:
        return _SUFFIXES[input_format]
    return next((name for magic, name in _MAGIC.items() if first.startswith(magic)), "jsonl")


def _begins_with(path: Path, beginning: Path) -> bool:
    with open(path, "rb") as file, open(beginning, "rb") as expected:
        return all(file.read(len(chunk)) == chunk for chunk in _chunks(expected))


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_AT_ONCE):
        yield chunk
