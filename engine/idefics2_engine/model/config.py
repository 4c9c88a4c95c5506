"""The shape of the model, read from a checkpoint's ``config.json``.

The 8B model's ``config.json`` omits most sizes. The defaults are those of transformers' Idefics2
and Mistral configurations, except the perceiver's ``rms_norm_eps``. Its default is the text model's
value, with which the perceiver was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.json_file import Section, read_json
from idefics2_engine.model.quantization import is_nf4
from idefics2_engine.model_files import CONFIG, printable_path, why_no_model

# cuBLAS has no fast kernels for an odd number of rows
_HEAD_ROWS = 64
# These bounds are far above any Idefics2. A larger number is an error in the file and must be
# reported before anything of that size is allocated. The 8B model has 32 layers, 32 heads, 980
# pixels per side, a width of 14336, 32003 tokens and 32768 positions.
_MOST_LAYERS = 1024
_MOST_HEADS = 1024
_MOST_PIXELS = 1 << 14
_MOST_WIDTH = 1 << 20
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP vision tower, with NaViT positions on a ``grid`` x ``grid`` grid."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Positions per side."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x rows x columns."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the perceiver, which resamples any number of patches to ``num_latents``."""

    hidden_size: int
    num_latents: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden_size


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the Mistral decoder.

    Query ``i`` attends to key ``j`` if ``0 <= i - j < sliding_window``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    pad_token_id: int

    @property
    def kv_values(self) -> int:
        """Values in a token's keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head, padded with zeros to a multiple of 64."""
        return -(-self.vocab_size // _HEAD_ROWS) * _HEAD_ROWS


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of the whole model.

    ``is_quantized`` says whether the checkpoint's files are in NF4.
    """

    vision: VisionConfig
    perceiver: PerceiverConfig
    text: TextConfig
    image_token_id: int
    tie_word_embeddings: bool
    is_quantized: bool = False

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read ``folder/config.json``.

        Raises:
            ConfigError: The file is missing, is not JSON, or describes another model or an
                impossible one.
        """
        if mistaken := why_no_model(folder):
            raise ConfigError(f"{printable_path(folder)}: {mistaken}")
        return cls.from_dict(read_json(folder / CONFIG))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Build from the parsed JSON of a ``config.json``."""
        top = Section("config.json", config)
        if config.get("model_type") is None:
            raise ConfigError("config.json: model_type must be 'idefics2', got none")
        top.require("model_type", "idefics2")
        is_quantized = is_nf4(top)
        vision, perceiver, text = (
            top.section(name) for name in ("vision_config", "perceiver_config", "text_config")
        )
        vision.require("hidden_act", "gelu_pytorch_tanh")
        perceiver.require("hidden_act", "silu")
        text.require("hidden_act", "silu")
        text.require("model_type", "mistral")
        text_config = _text_config(text)
        built = cls(
            vision=_vision_config(vision),
            perceiver=_perceiver_config(perceiver, text_config),
            text=text_config,
            image_token_id=top.index("image_token_id", 32001),
            tie_word_embeddings=top.flag("tie_word_embeddings"),
            is_quantized=is_quantized,
        )
        _check_shapes(built)
        return built


def _vision_config(vision: Section) -> VisionConfig:
    return VisionConfig(
        hidden_size=vision.size("hidden_size", 768, _MOST_WIDTH),
        intermediate_size=vision.size("intermediate_size", 3072, _MOST_WIDTH),
        num_layers=vision.size("num_hidden_layers", 12, _MOST_LAYERS),
        num_heads=vision.size("num_attention_heads", 12, _MOST_HEADS),
        num_channels=vision.size("num_channels", 3, _MOST_WIDTH),
        image_size=vision.size("image_size", 224, _MOST_PIXELS),
        patch_size=vision.size("patch_size", 32, _MOST_PIXELS),
        layer_norm_eps=vision.positive("layer_norm_eps", 1e-6),
    )


def _perceiver_config(perceiver: Section, text: TextConfig) -> PerceiverConfig:
    return PerceiverConfig(
        hidden_size=text.hidden_size,
        num_latents=perceiver.size("resampler_n_latents", 64, _MOST_WIDTH),
        num_layers=perceiver.size("resampler_depth", 3, _MOST_LAYERS),
        num_heads=perceiver.size("resampler_n_heads", 16, _MOST_HEADS),
        num_kv_heads=perceiver.size("num_key_value_heads", 4, _MOST_HEADS),
        head_dim=perceiver.size("resampler_head_dim", 96, _MOST_WIDTH),
        rms_norm_eps=perceiver.positive("rms_norm_eps", text.rms_norm_eps),
    )


def _text_config(text: Section) -> TextConfig:
    """Read the text model's sizes.

    Missing keys have Mistral's defaults. A missing ``text_config`` has Idefics2's defaults.
    """
    hidden = text.size("hidden_size", 4096, _MOST_WIDTH)
    heads = text.size("num_attention_heads", 32, _MOST_HEADS)
    eps, positions = (1e-6, 131072) if text.values else (1e-5, 32768)
    return TextConfig(
        vocab_size=text.size("vocab_size", 32000, _MOST_TOKENS),
        hidden_size=hidden,
        intermediate_size=text.size("intermediate_size", 14336, _MOST_WIDTH),
        num_layers=text.size("num_hidden_layers", 32, _MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=text.size("num_key_value_heads", 8, _MOST_HEADS),
        head_dim=text.size("head_dim", hidden // heads, _MOST_WIDTH),
        max_positions=text.size("max_position_embeddings", positions, _MOST_TOKENS),
        rms_norm_eps=text.positive("rms_norm_eps", eps),
        rope_theta=_rope_theta(text),
        sliding_window=text.size_or_none("sliding_window", 4096, 2**31 - 1),
        pad_token_id=text.index("pad_token_id", 0),
    )


def _check_shapes(config: ModelConfig) -> None:
    """Check combinations of sizes; raise ``ConfigError`` if the model is impossible."""
    vision, text = config.vision, config.text
    if vision.hidden_size % vision.num_heads:
        raise ConfigError(
            f"vision_config: hidden_size must be a multiple of num_attention_heads, "
            f"got {vision.hidden_size} and {vision.num_heads}"
        )
    if vision.grid < 1:
        raise ConfigError(
            f"vision_config: image_size must be at least patch_size {vision.patch_size}, "
            f"got {vision.image_size}"
        )
    if vision.num_channels != 3:
        raise ConfigError(f"vision_config: num_channels must be 3, got {vision.num_channels}")
    if text.head_dim % 2:
        raise ConfigError(
            f"text_config: head_dim must be even for rotary angles, got {text.head_dim}"
        )
    _check_heads("perceiver_config", config.perceiver.num_heads, config.perceiver.num_kv_heads)
    _check_heads("text_config", text.num_heads, text.num_kv_heads)
    if config.image_token_id >= text.vocab_size:
        raise ConfigError(
            f"config.json: image_token_id must be below vocab_size {text.vocab_size}, "
            f"got {config.image_token_id}"
        )


def _rope_theta(text: Section) -> float:
    """Read the rotary base from the top level or, since transformers 5, ``rope_parameters``."""
    parameters, scaling = text.section("rope_parameters"), text.section("rope_scaling")
    nested = parameters if parameters.values else scaling
    rope_type = nested.values.get("rope_type", nested.values.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"{text.name}: rope_type must be 'default', got {short_repr(rope_type)}")
    return nested.positive("rope_theta", text.positive("rope_theta", 10000.0))


def _check_heads(name: str, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ConfigError(
            f"{name}: query heads must be a multiple of key heads, got {heads} and {kv_heads}"
        )
