"""From the names of inputs to their sources. Modules of formats are imported when they are needed."""

import importlib
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import cast

from idefics2_engine.jobs.readers.files.named_files import is_remote
from idefics2_engine.jobs.readers.formats.input_paths import InputName
from idefics2_engine.jobs.readers.formats.jsonl_source import JsonlSource
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.source import Source

_FORMATS = "idefics2_engine.jobs.readers.formats"
# Each is called with the options, and with the paths or addresses of the files or the hub's name
_SOURCES = {
    "parquet": ("table", "ParquetSource"),
    "csv": ("table", "CsvSource"),
    "images": ("image_folder", "ImageFolderSource"),
    "webdataset": ("tar_shards", "TarShardSource"),
    "hub": ("datasets_hub", "HubSource"),
}


def open_sources(inputs: Iterable[InputName], options: InputOptions) -> list[Source]:
    """Return the sources of the inputs, in their order; neighbors of one format may share one.

    Raises:
        JobError: A file cannot be read.
        ConfigError: A library is missing.
    """
    sources: list[Source] = []
    for kind, group in groupby(inputs, key=attrgetter("format")):
        names = [one.name for one in group]
        if kind in ("jsonl", "openai"):
            # ``auto`` finds JSONL by the name, and the keys show its form
            given = {"jsonl": "plain", "openai": "openai"}.get(options.input_format)
            sources += [JsonlSource(name, given, options.max_line_bytes) for name in names]
            continue
        module, name = _SOURCES[kind]
        make = getattr(importlib.import_module(f"{_FORMATS}.{module}"), name)
        if kind == "hub":
            sources += [cast(Source, make(one, options)) for one in names]
        else:
            files = [one if is_remote(one) else Path(one) for one in names]
            sources.append(cast(Source, make(files, options)))
    return sources
