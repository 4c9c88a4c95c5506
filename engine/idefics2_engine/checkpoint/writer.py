"""Writing of checkpoints in the hub's format."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from idefics2_engine.checkpoint.companion_files import read_companions, write_config
from idefics2_engine.checkpoint.nf4_tensors import weight_tensors
from idefics2_engine.checkpoint.shards import INDEX, SINGLE
from idefics2_engine.checkpoint.tensor_mapping import HubTensor, dense_modules, tensor_places
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import NF4Linear
from idefics2_engine.model.low_rank import LowRank
from idefics2_engine.model.quantization import bitsandbytes_config
from idefics2_engine.model_files import CONFIG, is_there
from idefics2_kernels.gpu.checks import FLOATS as NF4_DTYPES


def save_checkpoint(
    model: Idefics2,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    config_from: Path | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write ``model`` to ``folder`` in the hub's format.

    All safetensors files in ``folder`` and their index are deleted first. Weights in NF4 are
    written without conversion, in bitsandbytes' format. The folder's ``config.json``, if there is
    one, is updated: whether the head is the embedding, and the quantization.

    Args:
        model: The model, with its weights on any device.
        folder: Folder to write to, which is created if necessary.
        dtype: Dtype of the dense weights, by default the model's. With NF4 weights it is also
            stored as the dtype to dequantize to.
        config_from: Folder from which JSON files and chat templates are copied. The tokenizer is
            one of them. By default those in ``folder`` are kept.
        max_shard_bytes: Maximum bytes of tensors in a file. A larger weight has its own file.

    Raises:
        ConfigError: A file to copy cannot be read, in which case nothing is written. Or the
            ``config.json`` to update is malformed, which is found after the weights are written.
        ValueError: The model has NF4 weights and the dtype is not bf16, fp16 or fp32. Or it has an
            adapter that is not merged, for which the format has no place.
    """
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError(
            "model must have no unmerged adapter: load it without, or with merge_adapter=True"
        )
    folder = Path(folder)
    dtype = dtype or model.dtype
    places = tensor_places(model)
    in_nf4 = {
        place.name
        for place in places
        if place.is_linear and isinstance(model.get_submodule(place.module), NF4Linear)
    }
    if in_nf4 and dtype not in NF4_DTYPES:
        raise ValueError(
            f"dtype must be bfloat16, float16 or float32 with weights in NF4, got {dtype}"
        )
    companions: dict[str, bytes] = {}
    if config_from is not None and os.path.realpath(config_from) != os.path.realpath(folder):
        companions = read_companions(Path(config_from))
    folder.mkdir(parents=True, exist_ok=True)
    # A reader could prefer an old file to a new one
    for old in (folder / INDEX, *folder.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    _write_shards(folder, _shards(model, places, in_nf4, dtype, max_shard_bytes))
    for name, content in companions.items():
        (folder / name).write_bytes(content)
    if is_there(folder / CONFIG):
        write_config(
            folder / CONFIG,
            tied=model.config.tie_word_embeddings,
            dtype=_dtype_name(dtype),
            quantization=_quantization(model, places, in_nf4, dtype) if in_nf4 else None,
        )


def _shards(
    model: Idefics2,
    places: Sequence[HubTensor],
    in_nf4: Collection[str],
    dtype: torch.dtype,
    most_bytes: int,
) -> list[dict[str, Tensor]]:
    """Return the model's tensors by name, on the CPU, in shards of at most ``most_bytes``.

    A weight is never split. A larger one has its own shard.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shards: list[dict[str, Tensor]] = [{}]
    for place in places:
        layer = model.get_submodule(place.module)
        if isinstance(layer, NF4Linear) and place.name in in_nf4:
            tensors = weight_tensors(place.name, layer.weight, dtype)
        else:
            rows = parameters[place.parameter][place.first_row : place.first_row + place.shape[0]]
            tensor = rows.detach().to("cpu", dtype).reshape(place.shape).contiguous()
            tensors = {place.name: tensor.clone()}
        if shards[-1] and _bytes(shards[-1]) + _bytes(tensors) > most_bytes:
            shards.append({})
        shards[-1] |= tensors
    return shards


def _write_shards(folder: Path, shards: Sequence[dict[str, Tensor]]) -> None:
    """Write one file, or several files and their index."""
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(_bytes(shard) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _quantization(
    model: Idefics2, places: Sequence[HubTensor], in_nf4: Collection[str], dtype: torch.dtype
) -> dict[str, object]:
    """Return the ``quantization_config`` for ``config.json``."""
    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    return bitsandbytes_config(
        _dtype_name(dtype),
        any(layer.weight.is_nested for layer in layers),
        dense_modules(places, in_nf4),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(shard: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())
