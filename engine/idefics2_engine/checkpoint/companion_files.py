"""The JSON files and templates of a checkpoint, copied when its weights are written."""

import json
from pathlib import Path
from typing import Any

from idefics2_engine.checkpoint.shards import INDEX
from idefics2_engine.images.settings import NESTED, PREPROCESSOR, PROCESSOR
from idefics2_engine.json_file import Section, parse_json, read_json
from idefics2_engine.model_files import paths_in, read_file


def read_companions(folder: Path) -> dict[str, bytes]:
    """Return the contents of the JSON files and templates in ``folder`` by name.

    The index of the weights is omitted. Image settings in ``processor_config.json`` are moved to
    ``preprocessor_config.json``, which every release of transformers reads.

    Raises:
        ConfigError: ``folder`` or a file cannot be read, a file is not a regular file, or
            ``processor_config.json`` is malformed.
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
    """Update the ``config.json`` at ``path`` after the weights were written.

    Args:
        path: The file, which is written only if a value changes.
        tied: Whether the head is the embedding.
        dtype: Dtype to write with ``quantization``. Without it the file keeps its dtype.
        quantization: The ``quantization_config``, or ``None`` to remove it.

    Raises:
        ConfigError: The file cannot be read as a JSON object.
    """
    values = read_json(path)
    before = dict(values)
    if bool(values.get("tie_word_embeddings")) != tied:
        values["tie_word_embeddings"] = tied
    if quantization is None:
        values.pop("quantization_config", None)
    else:
        values["quantization_config"] = quantization
        # Older releases of transformers write torch_dtype, and newer ones dtype
        values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    if values != before:
        path.write_text(_json(values), encoding="utf-8")


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"
