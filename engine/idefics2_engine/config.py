"""The shape of the model, read from a checkpoint's ``config.json``; frozen, derived values are properties.

``config.json`` on the hub is 684 bytes and leaves most sizes to defaults. The defaults here are those of
transformers' Idefics2 and Mistral configurations, except the perceiver's norm epsilon: it was trained with
the text model's, which is what a missing ``rms_norm_eps`` means here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError

PAGE_SIZE = 64  # tokens of the KV cache that are given and taken together
_HEAD_ROWS = 64  # cuBLAS loses its fast kernels on an odd number of rows


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP vision tower with NaViT positions on a grid of ``grid`` x ``grid``."""

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
    """Resampler of any number of patches to ``num_latents`` embeddings."""

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
    """Mistral decoder; query ``i`` sees key ``j`` when ``0 <= i - j < sliding_window``."""

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
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head as stored here, a multiple of 64; the last ones are zero."""
        return -(-self.vocab_size // _HEAD_ROWS) * _HEAD_ROWS


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the parameters' shapes and the forward pass."""

    vision: VisionConfig
    perceiver: PerceiverConfig
    text: TextConfig
    image_token_id: int
    tie_word_embeddings: bool

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read ``folder/config.json``.

        Raises:
            ConfigError: The file is missing, is not JSON, or describes another or an impossible model.
        """
        return cls.from_dict(read_json(folder / "config.json"))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Build from the parsed JSON of a ``config.json``."""
        model_type = config.get("model_type")
        if model_type != "idefics2":
            raise ConfigError(f"config.json: model_type must be 'idefics2', got {model_type!r}")
        vision, perceiver, text = (
            _Section(name, config.get(name) or {})
            for name in ("vision_config", "perceiver_config", "text_config")
        )
        vision.require("hidden_act", "gelu_pytorch_tanh")
        perceiver.require("hidden_act", "silu")
        text.require("hidden_act", "silu")
        text.require("model_type", "mistral")
        hidden = text.size("hidden_size", 4096)
        heads = text.size("num_attention_heads", 32)
        # Mistral's own defaults apply inside a text_config, Idefics2's where there is none
        eps = text.positive("rms_norm_eps", 1e-6 if text.values else 1e-5)
        built = cls(
            vision=VisionConfig(
                hidden_size=vision.size("hidden_size", 768),
                intermediate_size=vision.size("intermediate_size", 3072),
                num_layers=vision.size("num_hidden_layers", 12),
                num_heads=vision.size("num_attention_heads", 12),
                num_channels=vision.size("num_channels", 3),
                image_size=vision.size("image_size", 224),
                patch_size=vision.size("patch_size", 32),
                layer_norm_eps=vision.positive("layer_norm_eps", 1e-6),
            ),
            perceiver=PerceiverConfig(
                hidden_size=hidden,
                num_latents=perceiver.size("resampler_n_latents", 64),
                num_layers=perceiver.size("resampler_depth", 3),
                num_heads=perceiver.size("resampler_n_heads", 16),
                num_kv_heads=perceiver.size("num_key_value_heads", 4),
                head_dim=perceiver.size("resampler_head_dim", 96),
                rms_norm_eps=perceiver.positive("rms_norm_eps", eps),
            ),
            text=TextConfig(
                vocab_size=text.size("vocab_size", 32000),
                hidden_size=hidden,
                intermediate_size=text.size("intermediate_size", 14336),
                num_layers=text.size("num_hidden_layers", 32),
                num_heads=heads,
                num_kv_heads=text.size("num_key_value_heads", 8),
                head_dim=text.size("head_dim", hidden // heads),
                max_positions=text.size(
                    "max_position_embeddings", 131072 if text.values else 32768
                ),
                rms_norm_eps=eps,
                rope_theta=_rope_theta(text),
                sliding_window=text.size_or_none("sliding_window", 4096),
                pad_token_id=text.index("pad_token_id", 0),
            ),
            image_token_id=_Section("config.json", config).index("image_token_id", 32001),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
        if built.vision.hidden_size % built.vision.num_heads:
            raise ConfigError(
                f"vision_config: hidden_size must be a multiple of num_attention_heads, "
                f"got {built.vision.hidden_size} and {built.vision.num_heads}"
            )
        _check_heads("perceiver_config", built.perceiver.num_heads, built.perceiver.num_kv_heads)
        _check_heads("text_config", built.text.num_heads, built.text.num_kv_heads)
        if built.image_token_id >= built.text.vocab_size:
            raise ConfigError(
                f"config.json: image_token_id must be below vocab_size {built.text.vocab_size}, "
                f"got {built.image_token_id}"
            )
        return built


@dataclass(frozen=True)
class GenerationConfig:
    """What ends an answer and what may not be in it: ``generation_config.json``."""

    eos_token_ids: frozenset[int]
    bad_words_ids: tuple[tuple[int, ...], ...]

    @classmethod
    def load(cls, folder: Path) -> "GenerationConfig":
        """Read ``folder/generation_config.json``; empty if there is none.

        Raises:
            ConfigError: The file holds something else than token ids.
        """
        path = folder / "generation_config.json"
        values = read_json(path) if path.exists() else {}
        eos = values.get("eos_token_id")
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        bad_words = values.get("bad_words_ids") or []
        if not _are_ids(eos):
            raise ConfigError(f"{path}: eos_token_id must be token ids, got {eos!r}")
        if not isinstance(bad_words, list) or not all(map(_are_ids, bad_words)):
            raise ConfigError(
                f"{path}: bad_words_ids must be lists of token ids, got {bad_words!r}"
            )
        return cls(frozenset(eos), tuple(tuple(word) for word in bad_words if word))

    def with_defaults(
        self, eos_token_ids: Iterable[int], bad_words_ids: Iterable[tuple[int, ...]]
    ) -> "GenerationConfig":
        """End at ``eos_token_ids`` where the file names none, and bar ``bad_words_ids`` in any case."""
        bad_words = dict.fromkeys((*self.bad_words_ids, *bad_words_ids))
        return GenerationConfig(self.eos_token_ids or frozenset(eos_token_ids), tuple(bad_words))


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the runtime."""

    max_model_len: int  # tokens of a prompt with its answer
    max_num_seqs: int  # sequences that run at once
    kv_cache_tokens: int  # tokens that the KV cache holds
    max_prefill_tokens: int = 8192  # prompt tokens of one step
    page_size: int = PAGE_SIZE  # tokens

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache."""
        return -(-self.kv_cache_tokens // self.page_size)


@dataclass(frozen=True)
class _Section:
    """One JSON object with typed reads; ``None`` means absent, as in transformers."""

    name: str
    values: Mapping[str, Any]

    def require(self, key: str, wanted: str) -> None:
        got = self.values.get(key)
        if got not in (None, wanted):
            raise ConfigError(f"{self.name}: {key} must be {wanted!r}, got {got!r}")

    def size(self, key: str, default: int) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise ConfigError(f"{self.name}: {key} must be a positive integer, got {value!r}")
        return value

    def size_or_none(self, key: str, default: int) -> int | None:
        if key in self.values and self.values[key] is None:
            return None
        return self.size(key, default)

    def index(self, key: str, default: int) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < 2**31:
            raise ConfigError(f"{self.name}: {key} must be a token id, got {value!r}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.name}: {key} must be a positive number, got {value!r}")
        return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from ``path``, or raise ``ConfigError`` naming it."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ConfigError(f"{path}: is not JSON") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def _rope_theta(text: _Section) -> float:
    """Read the rotary base, at the top level before transformers 5 and in ``rope_parameters`` since."""
    nested = text.values.get("rope_parameters") or text.values.get("rope_scaling") or {}
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"{text.name}: rope_type must be 'default', got {rope_type!r}")
    top = text.positive("rope_theta", 10000.0)
    return _Section(f"{text.name}.rope_parameters", nested).positive("rope_theta", top)


def _check_heads(name: str, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ConfigError(
            f"{name}: query heads must be a multiple of key heads, got {heads} and {kv_heads}"
        )
