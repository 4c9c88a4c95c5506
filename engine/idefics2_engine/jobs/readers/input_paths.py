"""The files that an input names, and the format of each."""

import glob
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.readers.named_files import is_remote, shown_name
from idefics2_engine.jobs.readers.unpacked_files import COMPRESSIONS
from idefics2_engine.model_files import paths_in

HUB = "hf:"
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
_IMAGES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)


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
    found = [one for name in names for one in _find(name, given_format)]
    found.sort()
    for one, following in pairwise(found):
        if one.name == following.name:
            raise ConfigError(f"inputs must name each file once, got {short_repr(one.name)} twice")
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


def _find(name: str, given_format: str) -> Iterator[InputName]:
    if name.startswith(HUB):
        yield InputName(name, "hub", None)
    elif is_remote(name):
        from idefics2_engine.jobs.readers.remote_files import expand_remote

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
    return "images" if suffix in _IMAGES else _FORMATS.get(suffix)
