"""Loading of checkpoints in the hub's format.

A fused layer combines several tensors of a checkpoint. If one of them is in NF4, each becomes a
separate layer in a ``SideBySide``, because quantized tensors have separate blocks and states.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from idefics2_engine.checkpoint.adapter_loading import describe, load_adapter, weights_beside
from idefics2_engine.checkpoint.nf4_tensors import (
    check_headers,
    is_in_nf4,
    read_weight,
    tensor_names,
    weight_name,
)
from idefics2_engine.checkpoint.parameter_filler import ParameterFiller
from idefics2_engine.checkpoint.safetensors_header import FLOATS, StoredTensor
from idefics2_engine.checkpoint.shards import find_weights, join_names
from idefics2_engine.checkpoint.tensor_mapping import (
    HEAD,
    HubTensor,
    hub_tensors,
    in_our_names,
)
from idefics2_engine.checkpoint.tensor_values import read_values
from idefics2_engine.checkpoint.tied_head import resolve_tied_head
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import Linear, NF4Linear, SideBySide
from idefics2_engine.model.quantization import Quantization
from idefics2_engine.model_files import printable_path
from idefics2_kernels import REFERENCE, NF4Weight, Ops
from idefics2_kernels.gpu.checks import FLOATS as NF4_DTYPES

_logger = logging.getLogger(__name__)


def build_model(
    config: ModelConfig,
    ops: Ops = REFERENCE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
) -> Idefics2:
    """Build a model with uninitialized weights, for ``init_weights``.

    The linear layers of the parts in ``quantization`` are NF4 layers.

    Raises:
        ConfigError: ``config`` has a ``quantization_config``, which does not say exactly which
            layers are in NF4. Or ``quantization`` is given and ``dtype`` is not bf16, fp16 or fp32.
    """
    if config.is_quantized:
        raise ConfigError(
            "config.json: quantization_config must be absent where no weights are read: ask for quantization instead"
        )
    return build_with_nf4(config, ops, device, dtype, _chosen(config, quantization))


def load_checkpoint(
    folder: Path | str,
    ops: Ops = REFERENCE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    adapter: Path | str | None = None,
    merge_adapter: bool | None = None,
    check_finite: bool = False,
    quantization: Quantization | None = None,
) -> Idefics2:
    """Build the model of ``folder`` on ``device`` in ``dtype``.

    All headers of the files are checked first, so no parameter is allocated for a checkpoint that
    does not fit. Files are memory-mapped, and one tensor at a time is copied to its parameter.
    Quantization needs extra memory for one tensor on the device.

    Args:
        folder: A checkpoint in the hub's format, possibly quantized to NF4 by bitsandbytes.
        ops: Implementation of the operations.
        device: Device of the parameters.
        dtype: Dtype of the parameters, and of computing with NF4 weights.
        adapter: Folder of a LoRA adapter in PEFT's format.
        merge_adapter: Whether to merge the adapter's pairs into the weights, before quantization.
            If false, they are kept beside all linear layers. If ``None``, they are kept beside
            weights in NF4 and merged into others.
        check_finite: Check every value for NaN, infinity, and overflow in ``dtype``.
        quantization: Parts to quantize on ``device``. Each tensor is first rounded to ``dtype``.

    Raises:
        ConfigError: A config of the model or the adapter is missing or invalid. Or the checkpoint
            is quantized and ``quantization`` is given or ``merge_adapter`` is true, or ``dtype``
            does not allow quantization. Or the adapter is DoRA and not merged.
        CheckpointError: A file or tensor is missing, unreadable, unexpected, or of another shape or
            dtype. Or, with ``check_finite``, a value is not finite.
    """
    begin = time.perf_counter()
    folder = Path(folder)
    config = ModelConfig.load(folder)
    _check_not_quantized_before(folder, config, adapter, quantization, merge_adapter)
    config, stored = resolve_tied_head(config, in_our_names(config, find_weights(folder)))
    places = {place.name: place for place in hub_tensors(config)}
    stored_nf4 = _check_fit(folder, config, places, stored)
    changes = None if adapter is None else load_adapter(Path(adapter), config, places, check_finite)
    in_nf4 = stored_nf4 | _chosen(config, quantization)
    beside = weights_beside(changes, places, stored_nf4, in_nf4, merge_adapter)
    model = build_with_nf4(config, ops, device, dtype, in_nf4)
    filler = ParameterFiller(
        model,
        changes,
        beside,
        check_finite=check_finite,
        double_quant=quantization is None or quantization.double_quant,
    )
    for source, value in _weights(stored, filler.places, stored_nf4, dtype):
        filler.fill(source, value)
    filler.add_low_rank()
    _logger.info(
        "loaded %s in %.2f s: files %d, %.1f MB; adapter %s, quantization %s, %s on %s",
        printable_path(folder),
        time.perf_counter() - begin,
        len({tensor.file for tensor in stored.values()}),
        sum(tensor.num_bytes for tensor in stored.values()) / 1e6,
        None if adapter is None or changes is None else describe(Path(adapter), changes, beside),
        "nf4" if stored_nf4 or quantization is not None else None,
        str(model.dtype).removeprefix("torch."),
        model.device,
    )
    return model


def _check_not_quantized_before(
    folder: Path,
    config: ModelConfig,
    adapter: Path | str | None,
    quantization: Quantization | None,
    merge_adapter: bool | None,
) -> None:
    """Raise ``ConfigError`` if a quantized checkpoint is to be quantized or merged."""
    if config.is_quantized and quantization is not None:
        raise ConfigError(
            f"{printable_path(folder)}: is quantized already: load it without quantization, or quantize the checkpoint it was made from"
        )
    if config.is_quantized and adapter is not None and merge_adapter:
        raise ConfigError(
            f"{printable_path(folder)}: is quantized, and an adapter must be merged before that: load it with "
            "merge_adapter=False, or the checkpoint that this was made from with the adapter and quantization"
        )


def _chosen(config: ModelConfig, quantization: Quantization | None) -> frozenset[str]:
    """Return the names of the tensors that ``quantization`` selects."""
    parts = () if quantization is None else quantization.parts
    places = hub_tensors(config)
    return frozenset(place.name for place in places if place.is_linear and place.part in parts)


def build_with_nf4(
    config: ModelConfig,
    ops: Ops,
    device: torch.device | str,
    dtype: torch.dtype,
    in_nf4: Collection[str],
) -> Idefics2:
    """Build a model with NF4 layers for the linear layers' tensors named ``in_nf4``.

    The dense weights that NF4 layers replace are never allocated.
    """
    if not in_nf4:
        return Idefics2(config, ops, device, dtype)
    if dtype not in NF4_DTYPES:
        raise ConfigError(
            f"dtype must be bfloat16, float16 or float32 with weights in NF4, got {dtype}"
        )
    model = Idefics2(config, ops, "meta", dtype)
    linear = (place for place in hub_tensors(config) if place.is_linear)
    for module, group in groupby(linear, key=lambda place: place.module):
        weights = list(group)
        if any(weight.name in in_nf4 for weight in weights):
            has_bias = model.get_submodule(module).bias is not None
            with torch.device("meta"):
                layers = [
                    (NF4Linear if weight.name in in_nf4 else Linear)(
                        weight.shape[1], weight.shape[0], ops, bias=has_bias
                    ).to(dtype)
                    for weight in weights
                ]
            model.set_submodule(module, layers[0] if len(layers) == 1 else SideBySide(layers))
    model.allocate(device)
    return model


def _check_fit(
    folder: Path,
    config: ModelConfig,
    places: Mapping[str, HubTensor],
    stored: Mapping[str, StoredTensor],
) -> frozenset[str]:
    """Check that ``stored`` has exactly the model's tensors; return the names of those in NF4."""
    in_nf4 = frozenset(
        name
        for name, place in places.items()
        if (place.is_linear or name == HEAD) and is_in_nf4(name, stored)
    )
    wanted = [
        tensor
        for name in places
        for tensor in (tensor_names(name, stored) if name in in_nf4 else [name])
    ]
    extra = stored.keys() - set(wanted)
    if extra:
        names = sorted(extra)
        raise CheckpointError(
            f"{printable_path(stored[names[0]].file)}: tensors are not part of this model: {join_names(names)}"
        )
    missing = [name for name in wanted if name not in stored]
    if missing:
        hint = (
            " (a head that is the embedding needs tie_word_embeddings: true "
            "at the top level of config.json)"
        )
        raise CheckpointError(
            f"{printable_path(folder)}: tensors are missing: {join_names(missing)}"
            + (hint if missing == [HEAD] else "")
        )
    for name, place in places.items():
        if name in in_nf4:
            check_headers(name, place.shape, stored)
        else:
            stored[name].check(place.shape, *FLOATS)
    if in_nf4 and not config.is_quantized:
        raise CheckpointError(
            f"{printable_path(folder)}: config.json must have a quantization_config, as tensors are in NF4: {join_names(sorted(in_nf4))}"
        )
    if config.is_quantized and not in_nf4:
        raise CheckpointError(
            f"{printable_path(folder)}: config.json has a quantization_config, but no tensor is in NF4"
        )
    return in_nf4


def _weights(
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, HubTensor],
    in_nf4: Collection[str],
    dtype: torch.dtype,
) -> Iterator[tuple[StoredTensor, Tensor | NF4Weight]]:
    """Yield the value of each of ``places`` with its description, file by file.

    A weight in NF4 is yielded after the last of its tensors is read.
    """
    # Tensors wait here for the others of their NF4 weight. These are few, because the order of
    # reading keeps the tensors of a weight together, except those in different shards
    waiting: dict[str, dict[str, Tensor]] = {}
    for source, tensor in read_values(
        sorted(stored.values(), key=lambda tensor: (tensor.file, weight_name(tensor.name)))
    ):
        name = weight_name(source.name)
        if name not in in_nf4:
            yield source, tensor
            continue
        tensors = waiting.setdefault(name, {})
        tensors[source.name] = tensor
        if len(tensors) == len(tensor_names(name, stored)):
            shape = places[name].shape
            yield stored[name], read_weight(stored[name], shape, waiting.pop(name), dtype)
