"""Checkpoints in the hub's form to parameters and back; the only file that knows checkpoint names.

A parameter here may be several tensors there: queries, keys and values lie in one matrix, gate and up in another, and
the vocabulary's rows are padded. ``hub_tensors`` is the whole map.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from idefics2_engine.adapter import Adapter
from idefics2_engine.config import ModelConfig
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model import Idefics2
from idefics2_engine.safetensors_file import FLOATS, StoredTensor
from idefics2_engine.weight_files import INDEX, SINGLE, find_weights, listing
from idefics2_kernels import REFERENCE, Ops


@dataclass(frozen=True)
class HubTensor:
    """One tensor of a checkpoint and the rows of the parameter it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    first_row: int = 0


def hub_tensors(config: ModelConfig) -> list[HubTensor]:
    """List every tensor that a checkpoint of ``config`` holds."""
    return [*_vision(config), *_connector(config), *_text(config)]


def _fused(
    hub: str, names: tuple[str, ...], rows: tuple[int, ...], tail: tuple[int, ...], parameter: str
) -> Iterator[HubTensor]:
    """Stack tensors ``hub.format(name)`` of ``rows`` each, in order, into one parameter."""
    first = 0
    for name, n in zip(names, rows, strict=True):
        yield HubTensor(hub.format(name), (n, *tail), parameter, first)
        first += n


def _vision(config: ModelConfig) -> Iterator[HubTensor]:
    c = config.vision
    hidden, inner = c.hidden_size, c.intermediate_size
    hub = "model.vision_model."
    conv = (hidden, c.num_channels, c.patch_size, c.patch_size)
    yield HubTensor(
        f"{hub}embeddings.patch_embedding.weight", conv, "vision.patch_embedding.weight"
    )
    yield HubTensor(
        f"{hub}embeddings.patch_embedding.bias", (hidden,), "vision.patch_embedding.bias"
    )
    yield HubTensor(
        f"{hub}embeddings.position_embedding.weight",
        (c.grid**2, hidden),
        "vision.position_embedding",
    )
    for i in range(c.num_layers):
        theirs, ours = f"{hub}encoder.layers.{i}.", f"vision.layers.{i}."
        for kind, tail in (("weight", (hidden,)), ("bias", ())):
            yield from _fused(
                f"{theirs}self_attn.{{}}_proj.{kind}",
                ("q", "k", "v"),
                (hidden,) * 3,
                tail,
                f"{ours}attention.qkv_proj.{kind}",
            )
            yield HubTensor(
                f"{theirs}self_attn.out_proj.{kind}",
                (hidden, *tail),
                f"{ours}attention.out_proj.{kind}",
            )
            yield HubTensor(
                f"{theirs}layer_norm1.{kind}", (hidden,), f"{ours}attention_norm.{kind}"
            )
            yield HubTensor(f"{theirs}layer_norm2.{kind}", (hidden,), f"{ours}mlp_norm.{kind}")
            yield HubTensor(f"{theirs}mlp.fc1.{kind}", (inner, *tail), f"{ours}mlp.fc1.{kind}")
            inner_tail = (inner,) if kind == "weight" else ()
            yield HubTensor(
                f"{theirs}mlp.fc2.{kind}", (hidden, *inner_tail), f"{ours}mlp.fc2.{kind}"
            )
    for kind in ("weight", "bias"):
        yield HubTensor(f"{hub}post_layernorm.{kind}", (hidden,), f"vision.norm.{kind}")


def _gated_mlp(theirs: str, ours: str, hidden: int, inner: int, out: int) -> Iterator[HubTensor]:
    yield from _fused(
        f"{theirs}{{}}_proj.weight",
        ("gate", "up"),
        (inner, inner),
        (hidden,),
        f"{ours}gate_up_proj.weight",
    )
    yield HubTensor(f"{theirs}down_proj.weight", (out, inner), f"{ours}down_proj.weight")


def _connector(config: ModelConfig) -> Iterator[HubTensor]:
    c, hub = config.perceiver, "model.connector."
    hidden = c.hidden_size
    width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield from _gated_mlp(
        f"{hub}modality_projection.",
        "connector.projection.",
        config.vision.hidden_size,
        config.text.intermediate_size,
        hidden,
    )
    hub, own = f"{hub}perceiver_resampler.", "connector.perceiver."
    yield HubTensor(f"{hub}latents", (c.num_latents, hidden), f"{own}latents")
    for i in range(c.num_layers):
        theirs, ours = f"{hub}layers.{i}.", f"{own}layers.{i}."
        for name, norm in (
            ("input_latents_norm", "latents_norm"),
            ("input_context_norm", "context_norm"),
            ("post_attention_layernorm", "mlp_norm"),
        ):
            yield HubTensor(f"{theirs}{name}.weight", (hidden,), f"{ours}{norm}.weight")
        yield HubTensor(
            f"{theirs}self_attn.q_proj.weight", (width, hidden), f"{ours}attention.q_proj.weight"
        )
        yield from _fused(
            f"{theirs}self_attn.{{}}_proj.weight",
            ("k", "v"),
            (kv_width, kv_width),
            (hidden,),
            f"{ours}attention.kv_proj.weight",
        )
        yield HubTensor(
            f"{theirs}self_attn.o_proj.weight", (hidden, width), f"{ours}attention.o_proj.weight"
        )
        yield from _gated_mlp(f"{theirs}mlp.", f"{ours}mlp.", hidden, c.intermediate_size, hidden)
    yield HubTensor(f"{hub}norm.weight", (hidden,), f"{own}norm.weight")


def _text(config: ModelConfig) -> Iterator[HubTensor]:
    c, hub = config.text, "model.text_model."
    hidden = c.hidden_size
    width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield HubTensor(f"{hub}embed_tokens.weight", (c.vocab_size, hidden), "text.embedding")
    for i in range(c.num_layers):
        theirs, ours = f"{hub}layers.{i}.", f"text.layers.{i}."
        yield from _fused(
            f"{theirs}self_attn.{{}}_proj.weight",
            ("q", "k", "v"),
            (width, kv_width, kv_width),
            (hidden,),
            f"{ours}attention.qkv_proj.weight",
        )
        yield HubTensor(
            f"{theirs}self_attn.o_proj.weight", (hidden, width), f"{ours}attention.o_proj.weight"
        )
        yield from _gated_mlp(f"{theirs}mlp.", f"{ours}mlp.", hidden, c.intermediate_size, hidden)
        yield HubTensor(
            f"{theirs}input_layernorm.weight", (hidden,), f"{ours}attention_norm.weight"
        )
        yield HubTensor(
            f"{theirs}post_attention_layernorm.weight", (hidden,), f"{ours}mlp_norm.weight"
        )
    yield HubTensor(f"{hub}norm.weight", (hidden,), "text.norm.weight")
    if not config.tie_word_embeddings:
        yield HubTensor("lm_head.weight", (c.vocab_size, hidden), "lm_head")


def load_checkpoint(
    folder: Path | str,
    ops: Ops = REFERENCE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    adapter: Path | str | None = None,
    check_finite: bool = False,
) -> Idefics2:
    """Build the model of ``folder`` on ``device`` in ``dtype``.

    The files' headers are checked first, all of them, so that nothing is allocated for a checkpoint that does not fit. Files are
    memory-mapped and each tensor goes straight to its place, so one tensor is the extra memory needed.

    Args:
        folder: A checkpoint in the hub's form.
        ops: Filling of the operations to run on.
        device: Where the parameters go.
        dtype: What they become, rounded once.
        adapter: Folder of a LoRA adapter in PEFT's format to merge.
        check_finite: Look at every value for NaN and infinity, and for overflow in ``dtype``.

    Raises:
        ConfigError: ``config.json`` is missing or wrong, or the adapter's.
        CheckpointError: A file or tensor is missing, cannot be read, has another shape or type, is not expected, or with
            ``check_finite`` holds a value that is no number.
    """
    folder = Path(folder)
    config = ModelConfig.load(folder)
    places = {place.name: place for place in hub_tensors(config)}
    stored = find_weights(folder)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # saved by some writers although it is the embedding
    _check_fit(folder, places, stored)
    changes = (
        None if adapter is None else _load_adapter(Path(adapter), config, places, check_finite)
    )
    model = Idefics2(config, ops, device, dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for table in {model.text.embedding, model.lm_head}:
            table[config.text.vocab_size :] = 0.0
        for source, tensor in _read(stored.values()):
            place = places[source.name]
            if check_finite:
                _check_finite(source, tensor)
            if changes is not None:
                tensor = changes.merge(source.name, tensor, dtype, model.device)
            rows = parameters[place.parameter][place.first_row : place.first_row + place.shape[0]]
            rows.copy_(tensor.view(rows.shape))
            if check_finite:
                _check_finite(source, rows, f" in {dtype}")
    return model


def _check_fit(folder: Path, places: dict[str, HubTensor], stored: dict[str, StoredTensor]) -> None:
    """Check that ``stored`` is what the model needs, no more and no less."""
    extra = stored.keys() - places.keys()
    if extra:
        names = sorted(extra)
        raise CheckpointError(
            f"{stored[names[0]].file}: tensors are not part of this model: {listing(names)}"
        )
    missing = [name for name in places if name not in stored]
    if missing:
        raise CheckpointError(f"{folder}: tensors are missing: {listing(missing)}")
    for name, tensor in stored.items():
        if tensor.shape != places[name].shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} must have shape {places[name].shape}, got {tensor.shape}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} must be {', '.join(FLOATS)}, got {tensor.dtype}"
            )


def _read(tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield the values of ``tensors``, each file's together."""
    for file, of_file in groupby(tensors, key=lambda tensor: tensor.file):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for tensor in of_file:
                    yield tensor, opened.get_tensor(tensor.name)
        except (
            SafetensorError,
            OSError,
        ) as error:  # the header was read: the file has changed since
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from None


def _load_adapter(
    folder: Path, config: ModelConfig, places: dict[str, HubTensor], check_finite: bool
) -> Adapter:
    """Read the adapter in ``folder`` and check that it fits."""
    adapter = Adapter.load(folder)
    tied = ("model.text_model.embed_tokens.weight", "lm_head.weight")
    if config.tie_word_embeddings and adapter.changed.keys() & set(tied):
        raise CheckpointError(
            f"{adapter.file}: changes the embedding or the head, which are one in this model: not supported"
        )
    adapter.check({name: place.shape for name, place in places.items()})
    if check_finite:
        for name, tensor in adapter.values.items():
            _check_finite(adapter.stored[name], tensor)
    return adapter


def _check_finite(source: StoredTensor, values: Tensor, where: str = "") -> None:
    """Refuse NaN and infinity among ``values``, naming the first and how many there are."""
    bad = ~torch.isfinite(values)
    count = int(bad.count_nonzero())
    if count:
        first = tuple(bad.nonzero()[0].tolist())
        raise CheckpointError(
            f"{source.file}: tensor {source.name!r} must be finite{where}, "
            f"got {count} values that are not, the first {values[first].item()} at {list(first)}"
        )


def save_checkpoint(
    model: Idefics2,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    config_from: Path | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write ``model`` to ``folder`` in the hub's form, in ``dtype`` (its own unless given).

    Weights are sharded by size and replace those that are there. The JSON files, the chat template and the tokenizer are copied from the folder ``config_from``; without
    it those of ``folder`` stay as they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / INDEX, *folder.glob("*.safetensors")):  # readers would take these first
        old.unlink(missing_ok=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shards: list[dict[str, Tensor]] = [{}]
    for place in hub_tensors(model.config):
        rows = parameters[place.parameter][place.first_row : place.first_row + place.shape[0]]
        tensor = rows.detach().to("cpu", dtype or model.dtype).reshape(place.shape).contiguous()
        if shards[-1] and _bytes(shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][place.name] = tensor.clone()
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        total = sum(_bytes(shard) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if config_from is not None:
        for source in (*Path(config_from).glob("*.json"), *Path(config_from).glob("*.jinja")):
            target = folder / source.name
            if source.name != INDEX and source.resolve() != target.resolve():
                shutil.copy(source, target)


def _bytes(shard: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())
