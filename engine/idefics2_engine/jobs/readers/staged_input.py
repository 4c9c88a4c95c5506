"""Standard input as a file in the job's folder, because a job reads its input several times."""

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.input_files import STAGED
from idefics2_engine.model_files import paths_in, printable_path

STDIN = "-"
_PART = "part"
_AT_ONCE = 1 << 20
# By the first bytes of a file
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_PARQUET = b"PAR1"
_SUFFIXES = {"parquet": "parquet", "csv": "csv", "webdataset": "tar"}


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
    part = folder / f"{STAGED}.{_PART}"
    before = [path for path in paths_in(folder, f"{STAGED}.*") if path != part]
    source = stream or _standard_input()
    with open(part, "wb") as file:
        for chunk in _chunks(source):
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
    if before and part.stat().st_size == before[0].stat().st_size:
        # With another time it would be another input
        part.unlink()
        return before[0]
    path = before[0] if before else folder / f"{STAGED}.{_suffix(part, input_format)}"
    os.replace(part, path)
    FileOperations().sync_folder(folder)
    return path


def _standard_input() -> BinaryIO:
    """Return standard input, of which nothing is read if it is closed."""
    is_open = sys.stdin is not None and not sys.stdin.closed
    return sys.stdin.buffer if is_open else io.BytesIO()


def _suffix(path: Path, input_format: str) -> str:
    with open(path, "rb") as file:
        first = file.read(4)
    packed = next((suffix for magic, suffix in _PACKED.items() if first.startswith(magic)), "")
    by_content = "parquet" if first == _PARQUET else "jsonl"
    return _SUFFIXES.get(input_format, by_content) + packed


def _begins_with(path: Path, beginning: Path) -> bool:
    with open(path, "rb") as file, open(beginning, "rb") as expected:
        return all(file.read(len(chunk)) == chunk for chunk in _chunks(expected))


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_AT_ONCE):
        yield chunk
