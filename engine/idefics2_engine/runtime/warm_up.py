"""Runs of a model that compile and load every variant of every kernel before the first request.

Kernels are compiled, or read from Triton's cache, when they are first launched. That takes a tenth
of a second or more, in which no request makes progress.
"""

import torch

from idefics2_engine.model.batch import ImageBatch, PagedView, TextBatch, cumulative
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import NF4Linear
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_kernels import variants
from idefics2_kernels.matmul.linear import FEW_ROWS

# The fewest rows with which the head is a cuBLAS product
_LOGIT_ROWS = FEW_ROWS + 1


@torch.inference_mode()
def warm_up_model(model: Idefics2, kv_cache: KVCache) -> None:
    """Run ``model`` once with each of the sizes in ``idefics2_kernels.variants``.

    The KV cache must have a page. It is read, but not written. Later steps of any size compile
    nothing.
    """
    perceiver, text = model.config.perceiver, model.config.text
    is_quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    for images, patches in variants.image_sizes(
        perceiver.num_latents,
        perceiver.num_heads,
        perceiver.num_kv_heads,
        perceiver.head_dim,
        model.dtype.itemsize,
        is_quantized=is_quantized,
    ):
        model.image_features(_images(model, images, patches))
    rows = variants.row_counts(is_quantized=is_quantized)
    steps = {(1, tokens, -(-tokens // kv_cache.page_size)) for tokens in rows}
    steps |= {(count, 1, pages) for count, pages in variants.decode_sizes(text.num_kv_heads)}
    for step in sorted(steps):
        model(_text(model, *step), None, kv_cache.layers)


@torch.inference_mode()
def warm_up_sampling(model: Idefics2, *, min_p_first: bool = True) -> None:
    """Sample from logits of each dtype and row stride that a step can have.

    Edited logits are fp32. Logits that were copied have no padding.
    """
    text = model.config.text
    ones = torch.ones(1, dtype=torch.float32, device=model.device)
    zeros, integers = torch.zeros_like(ones), torch.zeros_like(ones, dtype=torch.int64)
    words = -(-text.vocab_size // 32)
    bits = torch.full((1, words), -1, dtype=torch.int32, device=model.device)
    for dtype in {model.dtype, torch.float32}:
        for width in {text.padded_vocab_size, text.vocab_size}:
            logits = torch.zeros((1, width), dtype=dtype, device=model.device)
            logits = logits[:, : text.vocab_size]
            model.ops.apply_bitmask(logits, integers.int(), bits)
            model.ops.sample(
                logits,
                ones,
                integers,
                ones,
                zeros,
                integers,
                integers,
                min_p_first=min_p_first,
            )


def _images(model: Idefics2, images: int, patches: int) -> ImageBatch:
    """Make black images of ``patches`` patches each, in one row."""
    total = images * patches
    return ImageBatch(
        pixels=torch.zeros(total * model.config.vision.patch_dim, dtype=torch.uint8),
        widths=torch.full((images,), patches, dtype=torch.int32),
        position_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=cumulative([patches] * images),
        max_seqlen=patches,
    ).to(model.device)


def _text(model: Idefics2, sequences: int, tokens: int, pages: int) -> TextBatch:
    """Make ``sequences`` of ``tokens`` padding tokens each, which are not written to the cache."""
    total = sequences * tokens
    return TextBatch(
        input_ids=torch.zeros(total, dtype=torch.int32),
        positions=torch.zeros(total, dtype=torch.int32),
        cu_seqlens=cumulative([tokens] * sequences),
        max_seqlen=tokens,
        logits_indices=torch.arange(min(total, _LOGIT_ROWS), dtype=torch.int32),
        paged=PagedView(
            slots=torch.full((total,), -1, dtype=torch.int32),
            block_table=torch.zeros((sequences, pages), dtype=torch.int32),
            context_lens=torch.full((sequences,), tokens, dtype=torch.int32),
        ),
    ).to(model.device)
