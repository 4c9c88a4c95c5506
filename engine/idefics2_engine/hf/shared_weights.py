"""One memory for the weights of transformers' model and of the engine's.

The engine's model has fused parameters: queries, keys and values are one matrix, and gate and up
are another. transformers' parameters are views of their rows.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from idefics2_engine.checkpoint.loader import build_with_nf4
from idefics2_engine.checkpoint.tensor_mapping import (
    EMBEDDING,
    HEAD,
    HubTensor,
    hub_tensors,
    tensor_places,
)
from idefics2_engine.errors import ConfigError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import NF4Linear
from idefics2_kernels import NF4Weight, Ops

Modules = Mapping[str, nn.Module]
"""The modules of transformers' model by name."""


class NotShareableError(ValueError):
    """transformers' model has weights that the engine cannot compute with; the text says why."""


def views(packed: Idefics2) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense weights of ``packed`` by transformers' names, as views."""
    parameters = dict(packed.named_parameters(remove_duplicate=False))
    for place in tensor_places(packed):
        if place.parameter in parameters:
            yield place.name, _rows(parameters[place.parameter], place)
    if packed.config.tie_word_embeddings:
        vocab_size = packed.config.text.vocab_size
        yield HEAD, parameters["text.embedding"][:vocab_size].detach()


def _rows(parameter: Tensor, place: HubTensor) -> Tensor:
    rows = parameter[place.first_row : place.first_row + place.shape[0]]
    return rows.detach().view(place.shape)


def model_on(packed: Idefics2, kind: Any, config: Any, **arguments: Any) -> Any:
    """Build transformers' model on the weights of ``packed``, which it then shares.

    Args:
        packed: The engine's model, with dense weights.
        kind: transformers' class, or this package's.
        config: Its config.
        **arguments: Arguments of ``kind._from_config``.

    Raises:
        RuntimeError: transformers' model has tensors that ``packed`` lacks.
    """
    with torch.device("meta"):
        model: Any = kind._from_config(config, **arguments)
    for name, view in views(packed):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))
    if packed.config.tie_word_embeddings:
        model.lm_head.weight = model.get_parameter(EMBEDDING)
    text = model.model.text_model
    kind_of_table: Any = next(
        c for c in type(text.rotary_emb).__mro__ if c.__module__.startswith("transformers.")
    )
    made = kind_of_table(config.text_config).to(packed.device)
    for name, buffer in made.named_buffers():
        text.rotary_emb.register_buffer(name, buffer, persistent=False)
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in named if tensor.is_meta]
    if left:
        raise RuntimeError(f"transformers' model has tensors that ours lacks: {', '.join(left)}")
    return model.eval()


def config_of(model: Any) -> ModelConfig:
    """Return the engine's config of transformers' ``model``.

    Raises:
        NotShareableError: The engine does not compute such a model.
    """
    values = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise NotShareableError(str(error)) from error


class SharedWeights:
    """The engine's model on the weights of transformers' ``model``, which become views of it.

    Nothing is copied but what is fused, a group at a time. If the weights have been fused before,
    nothing is.

    Args:
        model: transformers' ``Idefics2ForConditionalGeneration``, dense or in bitsandbytes' NF4.
        config: ``config_of(model)``.
        ops: Operations of the engine's model.

    Raises:
        NotShareableError: A weight is on another device, of another dtype or in another format, or
            a layer is no plain one.
    """

    def __init__(self, model: Any, config: ModelConfig, ops: Ops) -> None:
        modules = dict(model.named_modules())
        head = _parameter(modules, HEAD)
        self._layers = _nf4_layers(modules, config, head.dtype)
        self._owners: dict[str, nn.Parameter] = {}
        for place in hub_tensors(config):
            if place.name not in self._layers:
                self._owners[place.name] = _parameter(modules, place.name)
                _check(place, self._owners[place.name], head)
        if config.tie_word_embeddings != (_parameter(modules, EMBEDDING) is head):
            raise NotShareableError(
                "config.tie_word_embeddings must say whether the head is the embedding, "
                f"got {config.tie_word_embeddings}"
            )
        packed = build_with_nf4(config, ops, "meta", head.dtype, self._layers)
        self.packed = packed
        self._nf4: dict[str, NF4Weight] = {}
        self._fuse(tensor_places(packed), head.device)
        packed.requires_grad_(False)
        self._views = dict(views(packed))

    def is_current(self, model: Any, config: ModelConfig, ops: Ops) -> bool:
        """Return whether the weights of ``model`` are still the views, and all else is the same."""
        if self.packed.config != config or self.packed.ops is not ops:
            return False
        modules = dict(model.named_modules())
        try:
            found = _nf4_layers(modules, config, self.packed.dtype)
            dense = {name: _parameter(modules, name) for name in self._views}
        except NotShareableError:
            return False
        return (
            found.keys() == self._layers.keys()
            and all(_is_same(dense[name], view) for name, view in self._views.items())
            and all(self._is_shared(name, layer) for name, layer in found.items())
        )

    def _is_shared(self, name: str, layer: Any) -> bool:
        own, theirs = self._nf4[name], layer.nf4_weight(self.packed.dtype)
        return bool(
            own.codes.data_ptr() == theirs.codes.data_ptr()
            and own.absmax.data_ptr() == theirs.absmax.data_ptr()
        )

    def _fuse(self, places: list[HubTensor], device: torch.device) -> None:
        groups: dict[str, list[HubTensor]] = defaultdict(list)
        for place in places:
            groups[place.parameter].append(place)
        meta = dict(self.packed.named_parameters(remove_duplicate=False))
        for name, group in groups.items():
            if group[0].name in self._layers:
                continue
            owners = [self._owners[place.name] for place in group]
            tensors = [owner.detach() for owner in owners]
            fused = _joined(tensors, meta[name].shape)
            if fused is None:
                fused = torch.zeros(meta[name].shape, dtype=meta[name].dtype, device=device)
                for place, tensor, owner in zip(group, tensors, owners, strict=True):
                    view = _rows(fused, place)
                    view.copy_(tensor)
                    owner.data = view
            module, _, leaf = name.rpartition(".")
            setattr(self.packed.get_submodule(module), leaf, nn.Parameter(fused, False))
        if self.packed.config.tie_word_embeddings:
            self.packed.lm_head = self.packed.text.embedding
        self._share_nf4(places)

    def _share_nf4(self, places: list[HubTensor]) -> None:
        """Give the engine's layers the NF4 weights, and transformers' the parts of stacked ones."""
        shared = [place for place in places if place.name in self._layers]
        for place in shared:
            weight = self._layers[place.name].nf4_weight(self.packed.dtype)
            self.packed.set_nf4(place.module, weight)
        for place in shared:
            layer = self.packed.get_submodule(place.module)
            assert isinstance(layer, NF4Linear)
            self._nf4[place.name] = layer.weight
            self._layers[place.name].share(layer.weight)


def _joined(tensors: list[Tensor], shape: torch.Size) -> Tensor | None:
    """Return one tensor of ``shape`` over ``tensors``, if they follow each other in its memory."""
    first = tensors[0]
    storage, end = first.untyped_storage(), first.data_ptr()
    for tensor in tensors:
        is_next = tensor.data_ptr() == end and tensor.is_contiguous()
        if not is_next or tensor.untyped_storage().data_ptr() != storage.data_ptr():
            return None
        end += tensor.nbytes
    wanted = shape.numel() * first.itemsize
    if wanted == end - first.data_ptr():
        return first.as_strided(shape, _strides(shape))
    # Rows of padding follow in a memory that was fused before
    if first.storage_offset() or storage.nbytes() != wanted:
        return None
    fused = first.as_strided(shape, _strides(shape))
    rows = sum(len(tensor) for tensor in tensors)
    return None if bool(fused[rows:].any()) else fused


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _is_same(parameter: Tensor, view: Tensor) -> bool:
    return (
        parameter.data_ptr() == view.data_ptr()
        and parameter.shape == view.shape
        and parameter.dtype == view.dtype
        and parameter.device == view.device
    )


def _owner(modules: Modules, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns the tensor ``name``, below PEFT's layers, and the last name."""
    module, _, leaf = name.rpartition(".")
    owner: Any = modules.get(module)
    if owner is None:
        raise NotShareableError(f"{name} must be a weight of the model, got none")
    while (inner := owner._modules.get("base_layer")) is not None:
        owner = inner
    return owner, leaf


def _parameter(modules: Modules, name: str) -> nn.Parameter:
    owner, leaf = _owner(modules, name)
    parameter = owner._parameters.get(leaf)
    # Quantized and distributed weights are of types of their own
    if type(parameter) is not nn.Parameter:
        kind = type(owner).__name__ if parameter is None else type(parameter).__name__
        raise NotShareableError(f"{name} must be a plain weight, got one of {kind}")
    return parameter


def _check(place: HubTensor, parameter: Tensor, head: Tensor) -> None:
    found = tuple(parameter.shape), parameter.dtype, parameter.device
    wanted = place.shape, head.dtype, head.device
    if found != wanted or parameter.is_meta:
        raise NotShareableError(
            f"{place.name} must be {' '.join(map(str, wanted))} like the head, "
            f"got {' '.join(map(str, found))}"
        )


def _nf4_layers(modules: Modules, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the layers whose weights are in NF4, by the names of the weights."""
    # A model has such layers only if bitsandbytes was imported
    if "bitsandbytes" not in sys.modules:
        return {}
    from idefics2_engine.hf.nf4 import Linear4bit

    found: dict[str, Any] = {}
    for place in hub_tensors(config):
        if not place.is_linear:
            continue
        layer, _ = _owner(modules, place.name)
        if not isinstance(layer, Linear4bit):
            continue
        weight = layer.nf4_weight(dtype)
        if weight is None or (layer.compute_dtype or dtype) != dtype:
            raise NotShareableError(
                f"{place.name} must be in NF4 of uint8 and multiplied in {dtype}, got "
                f"{layer.weight.dtype} and bnb_4bit_compute_dtype {layer.compute_dtype}"
            )
        found[place.name] = layer
    return found
