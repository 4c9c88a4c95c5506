"""The arguments of ``LLM``, each with the values that it takes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from idefics2_engine.checkpoint.hub import find_model
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import ConfigError, shown
from idefics2_engine.field_checks import (
    ListOf,
    MismatchError,
    Number,
    OneOf,
    OrNone,
    Whole,
    check,
    check_fields,
    checked,
    flag,
    path,
    text,
)
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.quantization import PARTS
from idefics2_engine.runtime.config import PAGE_SIZE, EngineConfig
from idefics2_kernels import Ops

# Far above any use: a larger number is a mistake, and should say so before anything is allocated or counted to.
_MOST_AT_ONCE = 1 << 20  # answers, or tokens of a step
_MOST_KEPT = 2**31 - 1  # tokens, pixels or bytes
_MOST_SECONDS = 86400.0
_MOST_THREADS = 1024
# 8 GiB at the 8B model's shape in 16 bit
_KV_CACHE_TOKENS = 65536


def _dtype(value: object) -> str | torch.dtype:
    """Accept a name, or a floating dtype of torch's."""
    if isinstance(value, str) or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    got = str(value) if isinstance(value, torch.dtype) else shown(value)
    raise MismatchError("the name of a dtype or a floating torch.dtype", got)


def _device(value: object) -> str:
    """Accept a name, or a device of torch's."""
    if isinstance(value, str | torch.device):
        return str(value)
    raise MismatchError("the name of a device", shown(value))


def _ops(value: object) -> Ops:
    if not isinstance(value, Ops):
        raise MismatchError("a filling of Ops", shown(value))
    return value


@dataclass(frozen=True, kw_only=True)
class LLMOptions:
    """What ``LLM`` was called with, checked; its docstring says what each means.

    Raises:
        ConfigError: A value is of the wrong type or out of its range, or two contradict each other.
    """

    model: str | Path | None = checked(OrNone(path))
    revision: str | None = checked(OrNone(text))
    adapter: str | Path | None = checked(OrNone(path))
    verify: bool = checked(flag)
    check_finite: bool = checked(flag)
    load_format: str = checked(OneOf("auto", "dummy"))
    device: str = checked(_device)
    dtype: str | torch.dtype = checked(_dtype)
    quantization: str | None = checked(OrNone(OneOf("nf4")))
    quantized_parts: tuple[str, ...] | None = checked(OrNone(ListOf(OneOf(*PARTS), "parts", 1)))
    double_quant: bool = checked(flag)
    split_images: bool | None = checked(OrNone(flag))
    max_model_len: int | None = checked(OrNone(Whole(2, _MOST_AT_ONCE)))
    max_num_seqs: int = checked(Whole(1, _MOST_AT_ONCE))
    max_num_batched_tokens: int = checked(Whole(1, _MOST_AT_ONCE))
    enable_prefix_caching: bool = checked(flag)
    kv_cache_tokens: int | None = checked(OrNone(Whole(1, _MOST_KEPT)))
    gpu_memory_utilization: float = checked(Number(0.0, 1.0, above=True))
    enforce_eager: bool = checked(flag)
    seed: int = checked(Whole(-(2**63), 2**63 - 1))
    sampling_order: str = checked(OneOf("vllm", "hf"))
    image_policy: str = checked(OneOf(*ImagePolicy))
    max_image_pixels: int = checked(Whole(1, _MOST_KEPT))
    max_media_bytes: int = checked(Whole(1, _MOST_KEPT))
    allowed_media_root: str | Path | None = checked(OrNone(path))
    allowed_media_hosts: tuple[str, ...] = checked(ListOf(text, "names of hosts"))
    media_timeout: float = checked(Number(0.0, _MOST_SECONDS, above=True))
    image_threads: int | None = checked(OrNone(Whole(1, _MOST_THREADS)))
    ops: Ops | None = checked(OrNone(_ops))

    def __post_init__(self) -> None:
        """Check every argument, then the ones that depend on each other."""
        check_fields(self, ConfigError)
        reads_weights = self.adapter is not None or self.verify or self.check_finite
        if self.load_format == "dummy" and reads_weights:
            raise ConfigError(
                "load_format 'dummy' reads no weights: it must come without adapter, verify and check_finite"
            )


def model_folder(model: str | Path | None, revision: str | None) -> Path:
    """Return the folder of ``model``, the demo checkpoint's for None."""
    if model is not None:
        return find_model(model, revision)
    if revision is not None:
        raise ConfigError(f"revision must come with a model, got {revision!r}")
    return DEMO_MODEL


def engine_config(
    config: ModelConfig, options: LLMOptions, *, cuda_graphs: bool, run_ahead: bool
) -> EngineConfig:
    """Return the sizes of the runtime; ``ConfigError`` if one does not fit the model or another."""
    positions = config.text.max_positions
    length = positions if options.max_model_len is None else options.max_model_len
    if length > positions:
        raise ConfigError(f"max_model_len must be from 2 to the model's {positions}, got {length}")
    kv_cache_tokens = options.kv_cache_tokens
    if kv_cache_tokens is None:
        whole_pages = -(-length // PAGE_SIZE) * PAGE_SIZE
        wanted = options.max_num_seqs * whole_pages
        kv_cache_tokens = max(whole_pages, min(_KV_CACHE_TOKENS, wanted))
    if kv_cache_tokens < length:
        raise ConfigError(
            f"kv_cache_tokens must be at least max_model_len {length}, got {kv_cache_tokens}"
        )
    return EngineConfig(
        max_model_len=length,
        max_num_seqs=options.max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
        max_num_batched_tokens=options.max_num_batched_tokens,
        prefix_caching=options.enable_prefix_caching,
        cuda_graphs=cuda_graphs,
        run_ahead=run_ahead,
    )


def at_least_one(name: str, value: int) -> int:
    """Return the integer ``value``; raise ``ConfigError`` unless it is one and positive."""
    number: int = check(name, value, Whole(1), ConfigError)
    return number
