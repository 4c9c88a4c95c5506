"""The map from the tensors of a checkpoint in the hub's format to the model's parameters.

Only this module knows the names of the tensors. ``hub_tensors`` is the whole map. A parameter may
consist of several tensors: queries, keys and values are rows of one matrix, and gate and up are
rows of another. The embedding and the head have extra rows, which pad the vocabulary.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.quantization import PARTS
from idefics2_engine.model_files import printable_path

# The map itself must not import torch
if TYPE_CHECKING:
    from idefics2_engine.model.idefics2 import Idefics2

EMBEDDING = "model.text_model.embed_tokens.weight"
HEAD = "lm_head.weight"
_BASE = "model."
_ROTARY_BUFFER = "rotary_emb.inv_freq"
_PREFIXES = dict(
    zip(PARTS, ("model.vision_model", "model.connector", "model.text_model"), strict=True)
)


@dataclass(frozen=True)
class HubTensor:
    """A tensor of a checkpoint and the rows of the parameter that it fills.

    Attributes:
        name: Name of the tensor in the hub's format.
        shape: Shape of the tensor.
        parameter: Name of the parameter in the model.
        first_row: Row of the parameter that is the tensor's first.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    first_row: int = 0

    @property
    def module(self) -> str:
        """Name of the module that owns the parameter, empty for the model itself."""
        return self.parameter.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether the tensor is the weight of a linear layer. The head is not counted as one."""
        return self.parameter.endswith(".weight") and len(self.shape) == 2

    @property
    def is_embedding(self) -> bool:
        """Whether the tensor is the embedding of the tokens or of the vision positions."""
        return self.parameter in ("text.embedding", "vision.position_embedding")

    @property
    def part(self) -> str:
        """Part of the model: ``vision``, ``connector``, ``text`` or ``lm_head``."""
        return self.parameter.partition(".")[0]


def hub_tensors(config: ModelConfig) -> list[HubTensor]:
    """Return the tensors of an unquantized checkpoint with ``config``, without a tied head."""
    return [*_vision(config), *_connector(config), *_text(config)]


def _fused(
    hub: str, names: tuple[str, ...], rows: tuple[int, ...], tail: tuple[int, ...], parameter: str
) -> Iterator[HubTensor]:
    """Yield the tensors ``hub.format(name)``, which are stacked in this order in ``parameter``.

    ``rows`` has the number of rows of each tensor, and ``tail`` is the shape of one row.
    """
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
    yield HubTensor(EMBEDDING, (c.vocab_size, hidden), "text.embedding")
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
        yield HubTensor(HEAD, (c.vocab_size, hidden), "lm_head")


def in_our_names(
    config: ModelConfig, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors ``stored`` by the names of ``hub_tensors``.

    A name in a file may have one ``model.`` too few or too many. Buffers of rotary frequencies are
    omitted, because these follow from the config. Other unknown tensors keep their names. The
    tensors of an NF4 weight keep their endings.

    Raises:
        CheckpointError: The names of two tensors are spellings of the same name.
    """
    from idefics2_engine.checkpoint.nf4_tensors import weight_name

    known = {tensor.name for tensor in hub_tensors(replace(config, tie_word_embeddings=False))}
    named: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        if key.endswith(_ROTARY_BUFFER):
            continue
        weight = weight_name(key)
        spellings = (weight, _BASE + weight, weight.removeprefix(_BASE))
        name = next((name for name in spellings if name in known), weight)
        name += key.removeprefix(weight)
        if name in named:
            raise CheckpointError(
                f"{printable_path(tensor.file)}: tensors {named[name].key!r:.200} and {key!r:.200} are the same one of this model"
            )
        named[name] = replace(tensor, name=name)
    return named


def tensor_places(model: "Idefics2") -> list[HubTensor]:
    """Return ``hub_tensors`` with the parameters of ``model``, which may have ``SideBySide``."""
    from idefics2_engine.model.linear import SideBySide

    placed: list[HubTensor] = []
    before: Counter[str] = Counter()
    for place in hub_tensors(model.config):
        if isinstance(model.get_submodule(place.module), SideBySide):
            i, kind = before[place.parameter], place.parameter.rpartition(".")[2]
            before[place.parameter] += 1
            place = replace(place, parameter=f"{place.module}.layers.{i}.{kind}", first_row=0)
        placed.append(place)
    return placed


def dense_modules(places: Iterable[HubTensor], in_nf4: Collection[str]) -> list[str]:
    """Return the hub's names of the linear layers whose weights are not ``in_nf4``, and the head.

    For a part of the model without NF4 weights, its prefix is returned instead.
    """
    skipped = [HEAD.removesuffix(".weight")]
    for part, prefix in _PREFIXES.items():
        names = [place.name for place in places if place.is_linear and place.part == part]
        dense = [name.removesuffix(".weight") for name in names if name not in in_nf4]
        skipped += [prefix] if len(dense) == len(names) else dense
    return skipped
