"""The files that an input names, and the format of each."""

import glob
import os
import re
from collections.abc import Iterator
from itertools import pairwise, product, zip_longest
from math import prod
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.readers.files.named_files import is_remote, shown_name
from idefics2_engine.jobs.readers.files.unpacked_files import COMPRESSIONS
from idefics2_engine.jobs.readers.formats.image_folder import IMAGE_SUFFIXES, identify_folder
from idefics2_engine.jobs.store.input_files import InputFile, identify_inputs
from idefics2_engine.model_files import paths_in

_HUB = "hf:"
HUB_FORMAT = "hub"
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}", re.ASCII)
_MOST_FILES = 100_000


class InputName(NamedTuple):
    """One input.

    Attributes:
        name: A path, an address, or a dataset of the hub.
        format: One of ``FORMATS`` without ``auto``, or ``hub``. ``jsonl`` may have either form if
            the format was not given.
        folder: Folder of the file, or the folder itself. None if it is not on this machine.
    """

    name: str
    format: str
    folder: Path | None


def find_inputs(names: tuple[str, ...], given_format: str) -> list[InputName]:
    """Return the inputs in the order of their names.

    Raises:
        ConfigError: There is none, one is named twice, or a format is unknown.
    """
    found = [
        one for name in names for each in expand_ranges(name) for one in _find(each, given_format)
    ]
    found.sort()
    for one, following in pairwise(found):
        if one.name == following.name:
            raise ConfigError(f"inputs must name each file once, got {short_repr(one.name)} twice")
    return found


def identify_input(one: InputName) -> InputFile:
    """Return the identity of an input that is not of the hub.

    Raises:
        JobError: A remote file or a folder cannot be read.
        OSError: There is no such file.
    """
    if is_remote(one.name):
        from idefics2_engine.jobs.readers.files.remote_files import identify_remote

        return identify_remote(one.name)
    path = Path(one.name)
    if path.is_dir():
        return identify_folder(path)
    (found,) = identify_inputs([path.absolute()])
    return found


def media_root(inputs: list[InputName]) -> Path:
    """Return the folder of the inputs, by default that of the process.

    Raises:
        ConfigError: They are in several folders.
    """
    folders = {Path(os.path.abspath(one.folder or ".")) for one in inputs}
    if len(folders) > 1:
        raise ConfigError(
            f"media_root must be given, because the inputs are in {len(folders)} folders"
        )
    return folders.pop()


def expand_ranges(name: str) -> list[str]:
    """Return the names for which one with ranges such as ``{000..012}`` stands, in order.

    A file with exactly that name is itself.

    Raises:
        ConfigError: There are more than 100,000.
    """
    parts = _RANGE.split(name)
    if len(parts) == 1 or os.path.lexists(name):
        return [name]
    texts, ranges = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    numbers = [range(int(first), int(last) + 1) for first, last in ranges]
    if not 0 < prod(map(len, numbers)) <= _MOST_FILES:
        raise ConfigError(
            f"{shown_name(name)}: must stand for 1 to {_MOST_FILES} files, with ranges that grow"
        )
    names = []
    for chosen in product(*numbers):
        shown = [
            f"{number:0{len(first)}}" for number, (first, _) in zip(chosen, ranges, strict=True)
        ]
        names.append("".join(map("".join, zip_longest(texts, shown, fillvalue=""))))
    return names


def _find(name: str, given_format: str) -> Iterator[InputName]:
    if name.startswith(_HUB):
        yield InputName(name, HUB_FORMAT, None)
    elif is_remote(name):
        from idefics2_engine.jobs.readers.files.remote_files import expand_remote

        for one in expand_remote(name):
            yield InputName(one, _format(one, given_format), None)
    elif os.path.isdir(name):
        yield from _in_folder(Path(name), given_format)
    elif os.path.lexists(name):
        yield InputName(name, _format(name, given_format), Path(name).parent)
    elif glob.has_magic(name):
        paths = [path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)]
        if not paths:
            raise ConfigError(f"inputs must name files, got no file like {short_repr(name)}")
        for path in paths:
            yield InputName(path, _format(path, given_format), Path(path).parent)
    elif name == "-":
        raise ConfigError("inputs: standard input must be staged to a file first")
    else:
        raise ConfigError(f"{shown_name(name)}: must be an input file, got no such file")


def _in_folder(folder: Path, given_format: str) -> Iterator[InputName]:
    """Yield the folder if it has images alone, and otherwise its files of rows.

    Raises:
        ConfigError: The folder has neither, or files of several formats.
    """
    if given_format != "images":
        wanted = "jsonl" if given_format == "openai" else given_format
        paths = [path for path in paths_in(folder, "[!.]*") if not path.is_dir()]
        kinds = {path: kind for path in paths if (kind := _known_format(path.name)) != "images"}
        files = {path: kind for path, kind in kinds.items() if kind and wanted in ("auto", kind)}
        if len(set(files.values())) > 1:
            raise ConfigError(
                f"{shown_name(folder)}: must have files of one format, "
                f"got {', '.join(sorted(set(files.values())))}"
            )
        for path, kind in files.items():
            yield InputName(str(path), kind if given_format == "auto" else given_format, folder)
        if files:
            return
    if given_format in ("auto", "images") and _has_images(folder):
        yield InputName(str(folder), "images", folder)
        return
    raise ConfigError(f"{shown_name(folder)}: must have input files, got none")


def _has_images(folder: Path) -> bool:
    return any(_known_format(name) == "images" for _, _, names in os.walk(folder) for name in names)


def _format(name: str, given: str) -> str:
    found = _known_format(name) if given == "auto" else given
    if found is None:
        raise ConfigError(
            f"{shown_name(name)}: the format must be given, "
            "because the name does not show it (input_format, --input-format)"
        )
    return found


def _known_format(name: str) -> str | None:
    stem = name.lower()
    for suffix in COMPRESSIONS:
        stem = stem.removesuffix(suffix)
    suffix = os.path.splitext(stem)[1]
    return "images" if suffix in IMAGE_SUFFIXES else _FORMATS.get(suffix)
