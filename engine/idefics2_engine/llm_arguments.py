"""What the arguments of ``LLM`` mean: a folder, a device, a dtype, the sizes of the runtime."""

from pathlib import Path

import torch

from idefics2_engine.checkpoint.hub import find_model
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import ConfigError
from idefics2_engine.field_checks import Whole, check
from idefics2_engine.llm_options import LLMOptions
from idefics2_engine.model.config import PAGE_SIZE, EngineConfig, ModelConfig

_KV_CACHE_TOKENS = 65536  # 8 GiB at the 8B model's shape in 16 bit
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def torch_device(name: str) -> torch.device:
    """Return the device that ``name`` means; ``ConfigError`` if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def torch_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that ``name`` means on ``device``; ``ConfigError`` if it is none."""
    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[str(name)]
