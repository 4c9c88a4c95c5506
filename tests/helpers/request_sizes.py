"""Batches of many sizes for a model: rows of every residue, tensors at every alignment."""

from collections.abc import Iterator

import torch
from torch import Tensor

from idefics2_engine.model.batch import ImageBatch, PagedView, TextBatch, cumulative
from idefics2_engine.model.idefics2 import Idefics2

PAGE_SIZE = 64
# Rows of every residue, and around the sizes at which kernels change
ROWS = (
    *range(1, 41),
    *(63, 64, 65, 66, 67, 100, 112, 127, 128, 129, 130, 131, 132, 133, 134, 160, 200),
    *(255, 256, 257, 258, 300, 320, 383, 384, 385, 386, 448, 500, 511, 512, 513, 514, 600),
    *(1024, 1530, 4096, 4900),
)
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 40, 64, 65, 66, 67, 132, 133, 256)
PAGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 512)


def shifted(tensor: Tensor, device: torch.device, by: int) -> Tensor:
    """Copy ``tensor`` to a view on ``device`` that begins ``by`` elements after its storage."""
    there = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=device)
    return there[by:].view(tensor.shape).copy_(tensor)


def image_batches(model: Idefics2) -> Iterator[tuple[str, ImageBatch]]:
    """Yield black images of many sizes, each with a name."""
    for count in ROWS:
        yield f"an image of {count} patches", _images(model, [count], count % 4)
    for count in BATCHES:
        for most in (1, 35, 448):
            patches = [max(1, most - i % 3) for i in range(count)]
            yield f"{count} images of up to {most} patches", _images(model, patches, count % 4)


def text_batches(device: torch.device) -> Iterator[tuple[str, TextBatch]]:
    """Yield steps of padding tokens of many sizes, each with a name."""
    for count in ROWS:
        pages = -(-count // PAGE_SIZE)
        yield f"a prompt of {count}", _step([count], pages + count % 5, device, count % 4)
    for count in BATCHES:
        for pages in PAGES:
            name = f"{count} sequences of {pages} pages"
            yield f"{name}, decoding", _step([1] * count, pages, device, count % 4)
        for pages in (1, 16, 33):
            name = f"{count} sequences of {pages} pages, and a prompt of"
            yield f"{name} 2", _step([1] * count + [2], pages, device, pages % 4)
            yield f"{name} 60", _step([1] * count + [60], pages, device, pages % 4)


def draw(model: Idefics2, count: int, dtype: torch.dtype, *, padded: bool) -> None:
    """Sample from ``count`` rows of logits, with or without padding behind them."""
    text = model.config.text
    width = text.padded_vocab_size if padded else text.vocab_size
    logits = torch.zeros((count, width), dtype=dtype, device=model.device)[:, : text.vocab_size]
    ones = shifted(torch.ones(count), model.device, count % 4)
    zeros = shifted(torch.zeros(count), model.device, count % 4)
    integers = shifted(torch.zeros(count, dtype=torch.int64), model.device, count % 4)
    rows = shifted(torch.arange(count, dtype=torch.int32), model.device, count % 4)
    words = -(-text.vocab_size // 32)
    bits = shifted(torch.full((count, words), -1, dtype=torch.int32), model.device, count % 4)
    model.ops.apply_bitmask(logits, rows, bits)
    model.ops.sample(logits, ones, integers, ones, zeros, integers, integers)


def _images(model: Idefics2, patches: list[int], by: int) -> ImageBatch:
    total, device = sum(patches), model.device
    pixels = torch.zeros(total * model.config.vision.patch_dim, dtype=torch.uint8)
    return ImageBatch(
        # The wider loads need pixels at multiples of four bytes
        pixels=shifted(pixels, device, 4 * by),
        widths=shifted(torch.tensor(patches, dtype=torch.int32), device, by),
        position_ids=shifted(torch.zeros(total, dtype=torch.int64), device, by),
        cu_seqlens=shifted(cumulative(patches), device, by),
        max_seqlen=max(patches),
    )


def _step(lengths: list[int], pages: int, device: torch.device, by: int) -> TextBatch:
    tokens, count = sum(lengths), len(lengths)

    def moved(tensor: Tensor) -> Tensor:
        return shifted(tensor.int(), device, by)

    return TextBatch(
        input_ids=moved(torch.zeros(tokens)),
        positions=moved(torch.zeros(tokens)),
        cu_seqlens=moved(cumulative(lengths)),
        max_seqlen=max(lengths),
        logits_indices=moved(torch.arange(count)),
        paged=PagedView(
            slots=moved(torch.full((tokens,), -1)),
            block_table=moved(torch.zeros(count, pages)),
            context_lens=moved(torch.tensor(lengths)),
        ),
    )
