"""Measurement of the KV cache size that fits in a GPU's free memory, and the error if it does not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from idefics2_engine.errors import ConfigError
from idefics2_engine.model.batch import ImageBatch, TextBatch, cumulative
from idefics2_engine.model.config import TextConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.image_graphs import max_graph_patches

_logger = logging.getLogger(__name__)


def kv_cache_tokens(model: Idefics2, config: EngineConfig, utilization: float) -> int:
    """Measure how many tokens fit if ``utilization`` of the GPU's memory may be used in all.

    The largest steps that ``config`` allows are run once, without a cache, to measure their memory.
    The result is at most the tokens of ``max_num_seqs`` full sequences.

    Raises:
        ConfigError: One full sequence does not fit.
    """
    device, text = model.device, model.config.text
    try:
        steps = _peak_bytes(model, config)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"max_num_batched_tokens {config.max_num_batched_tokens}: a step of so many tokens, or of "
            f"{max_patches(model, config)} patches, must fit beside the weights, but ran out of memory"
        ) from None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    latents = config.max_cached_images * model.config.perceiver.num_latents
    encoded = latents * text.hidden_size * model.dtype.itemsize
    available = int(utilization * total) - (total - free) - steps - encoded
    _logger.info(
        "memory: %.1f GB free of %.1f GB, %.1f GB for the largest steps, %.1f GB for the KV cache",
        *(number / 1e9 for number in (free, total, steps, available)),
    )
    each = bytes_per_token(text, model.dtype)
    pages = available // (each * config.page_size)
    wanted = -(-config.max_model_len // config.page_size)
    if pages < wanted:
        raise ConfigError(
            f"max_model_len {config.max_model_len}: its KV cache must fit into gpu_memory_utilization {utilization} of "
            f"{total / 2**30:.1f} GiB, of which {available / 2**30:.1f} GiB are left for it; it takes "
            f"{wanted * config.page_size * each / 2**30:.1f} GiB"
        )
    return min(pages, config.max_num_seqs * wanted) * config.page_size


@contextmanager
def memory_as_config_error(config: EngineConfig) -> Iterator[None]:
    """Raise ``ConfigError`` if the KV cache or the CUDA graphs of ``config`` do not fit."""
    try:
        yield
    except RuntimeError as error:
        # PyTorch's allocator and CUDA raise different classes
        if "out of memory" not in str(error):
            raise
        graphs = " and the CUDA graphs of all steps" if config.cuda_graphs else ""
        eager = ", or set enforce_eager" if config.cuda_graphs else ""
        raise ConfigError(
            f"kv_cache_tokens {config.kv_cache_tokens}: a KV cache of so many tokens{graphs} must "
            f"fit beside the weights, but ran out of memory; lower kv_cache_tokens or "
            f"gpu_memory_utilization{eager}"
        ) from error


def bytes_per_token(text: TextConfig, dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return text.kv_values * dtype.itemsize


@torch.inference_mode()
def _peak_bytes(model: Idefics2, config: EngineConfig) -> int:
    """Return the peak memory of the largest steps of images and of text, in bytes."""
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model.image_features(_images(model, max_patches(model, config)))
    model(_text(model, config))
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before


def max_patches(model: Idefics2, config: EngineConfig) -> int:
    """Return the most patches that are encoded at once."""
    if config.cuda_graphs:
        return max_graph_patches(config.max_patches, model.config.vision.grid)
    return config.max_patches


def _images(model: Idefics2, num_patches: int) -> ImageBatch:
    """Make black images of the largest size, with at most ``num_patches`` in all."""
    vision = model.config.vision
    each = vision.grid**2
    count = max(1, num_patches // each)
    return ImageBatch(
        pixels=torch.zeros(
            count * each * vision.patch_size**2 * 3, dtype=torch.uint8, device=model.device
        ),
        widths=torch.full((count,), vision.grid, dtype=torch.int32),
        position_ids=torch.arange(each).repeat(count),
        cu_seqlens=cumulative([each] * count),
        max_seqlen=each,
    ).to(model.device)


def _text(model: Idefics2, config: EngineConfig) -> TextBatch:
    """Make a step of the most tokens, with logits for one token of each sequence."""
    longest, tokens = config.max_model_len, config.max_num_batched_tokens
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    batch = TextBatch.from_ids([[0] * length for length in lengths])
    rows = torch.arange(min(config.max_num_seqs, tokens))
    return TextBatch(batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, rows).to(
        model.device
    )
