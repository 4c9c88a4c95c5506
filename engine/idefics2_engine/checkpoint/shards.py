"""Search for the weight files of a checkpoint, of which only the headers are read."""

import os
from collections.abc import Collection
from pathlib import Path

from idefics2_engine.checkpoint.safetensors_header import StoredTensor, read_header
from idefics2_engine.errors import CheckpointError, short_repr
from idefics2_engine.json_file import printable, read_json
from idefics2_engine.model_files import is_there, paths_in, printable_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Common file systems have this limit
_MOST_NAME_BYTES = 255
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the descriptions of all tensors of the checkpoint in ``folder`` by name.

    Raises:
        ConfigError: The index of the shards cannot be read as a JSON object.
        CheckpointError: A file is missing or malformed, or the index and its shards contradict each
            other.
    """
    index = _read_index(folder)
    if index is None:
        return read_header(folder / SINGLE)
    _check_present(folder, set(index.values()))
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{printable_path(folder)}: tensor {name!r:.200} is in two shards: {tensors[name].file.name} and {file}"
                )
            if index.get(name) != file:
                placed = index.get(name, "nowhere")
                raise CheckpointError(
                    f"{printable_path(folder / file)}: holds {name!r:.200}, which {INDEX} places in {placed}"
                )
            tensors[name] = tensor
    lacking = [name for name in index if name not in tensors]
    if lacking:
        raise CheckpointError(
            f"{printable_path(folder / index[lacking[0]])}: lacks tensors that {INDEX} places in it: {join_names(lacking)}"
        )
    return tensors


def weight_paths(folder: Path) -> list[Path]:
    """Return the sorted weight files of the checkpoint in ``folder`` without opening them.

    Raises:
        ConfigError: The index of the shards cannot be read as a JSON object.
        CheckpointError: A file is missing, or the index is malformed.
    """
    index = _read_index(folder)
    names = {SINGLE} if index is None else set(index.values())
    _check_present(folder, names)
    return [folder / name for name in sorted(names)]


def join_names(names: Collection[str], most: int = 3) -> str:
    """Join the first ``most`` of ``names`` for a message, with the number of the others."""
    first = ", ".join(printable(name) for name in list(names)[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return the index from tensor to file, or ``None`` if there is a single file.

    A single file has precedence over an index, as in transformers.
    """
    if is_there(folder / SINGLE):
        return None
    path = folder / INDEX
    if not is_there(path):
        raise CheckpointError(_nothing(folder))
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{printable_path(path)}: must hold a 'weight_map' object, got {short_repr(weight_map)}"
        )
    for name, file in weight_map.items():
        if not _is_plain(file):
            raise CheckpointError(
                f"{printable_path(path)}: {name!r:.200} must be in a .safetensors file of this folder, got {short_repr(file)}"
            )
    return weight_map


def _is_plain(file: object) -> bool:
    """Return whether ``file`` is a printable name of a safetensors file, and not a path.

    Separators of all operating systems are excluded.
    """
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and file.isprintable()
        and len(file.encode()) <= _MOST_NAME_BYTES
        and not any(character in "/\\:" for character in file)
    )


def _check_present(folder: Path, names: set[str]) -> None:
    missing = sorted(name for name in names if not os.path.exists(folder / name))
    if missing:
        raise CheckpointError(
            f"{printable_path(folder)}: {len(missing)} of {len(names)} weight files are missing: {join_names(missing, 20)}"
        )


def pickles(folder: Path) -> list[str]:
    """Return the names of pickles in ``folder``, which can run code and are never read.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    return [printable(path.name) for path in paths_in(folder, *_PICKLES, error=CheckpointError)]


def _nothing(folder: Path) -> str:
    message = f"{printable_path(folder)}: holds neither {SINGLE} nor {INDEX}"
    if found := pickles(folder):
        message += (
            f", only pickles ({join_names(found)}), which are refused because they can run code when they are read: "
            "convert them to safetensors where you trust them"
        )
    return message
