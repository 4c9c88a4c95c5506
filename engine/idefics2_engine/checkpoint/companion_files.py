"""The JSON files and templates of a checkpoint, copied when its weights are written."""

import json
from pathlib import Path
from typing import Any

from idefics2_engine.checkpoint.shards import INDEX
from idefics2_engine.images.settings import NESTED, PREPROCESSOR, PROCESSOR
from idefics2_engine.json_file import Section, parse_json, read_json
from idefics2_engine.model_files import paths_in, read_file


def read_companions(folder: Path) -> dict[str, bytes]:
    """Return the files to write beside a copy of the weights in ``folder``, by name.

    Image settings in ``processor_config.json`` are moved to a separate file, which every release of
    transformers reads.

    Raises:
        ConfigError: A file is not a regular file or cannot be read, or ``processor_config.json`` is
            malformed.
    """
    paths = paths_in(folder, "*.json", "*.jinja")
    files = {path.name: read_file(path) for path in paths if path.name != INDEX}
    if PROCESSOR in files:
        values = parse_json(files[PROCESSOR], folder / PROCESSOR)
        if NESTED in values:
            nested = Section(PROCESSOR, values).section(NESTED).values
            if values.pop(NESTED) is not None:
                files[PREPROCESSOR] = _json(nested).encode()
            files[PROCESSOR] = _json(values).encode()
    return files


def write_config(
    path: Path, *, tied: bool, dtype: str, quantization: dict[str, object] | None
) -> None:
    """Update ``config.json`` at ``path``: whether the head is ``tied`` and what is quantized."""
    values = read_json(path)
    before = dict(values)
    if bool(values.get("tie_word_embeddings")) != tied:
        values["tie_word_embeddings"] = tied
    if quantization is None:
        values.pop("quantization_config", None)
    else:
        values["quantization_config"] = quantization
        values["dtype" if "dtype" in values else "torch_dtype"] = dtype  # the newer name, the older
    if values != before:
        path.write_text(_json(values), encoding="utf-8")


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"
