"""A padded batch as requests of the engine."""

from hashlib import blake2b
from itertools import count
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.hf.generation.obstacles import NotOnEngineError
from idefics2_engine.hf.generation.sampling import Sampling
from idefics2_engine.hf.padded_forward import cut_patches
from idefics2_engine.hf.rules import patch_positions
from idefics2_engine.model.batch import Picture
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.scheduling.placeholders import ImageItem, image_items
from idefics2_engine.scheduling.sequence import Request


def make_requests(
    model: Any,
    config: ModelConfig,
    sampling: Sampling,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    pixel_attention_mask: Tensor | None,
) -> list[Request]:
    """Return a request for each row of a batch that is padded on the left.

    Args:
        model: transformers' model.
        config: The engine's config of it.
        sampling: How answers are drawn.
        input_ids: (B, S).
        attention_mask: (B, S), zero on padding.
        pixel_values: (B, images, 3, height, width), normalized.
        pixel_attention_mask: (B, images, height, width), zero on padding.

    Raises:
        NotOnEngineError: The batch has another form, or is one that transformers refuses.
    """
    rows = _rows(input_ids, attention_mask, config)
    pictures = _pictures(model, config, pixel_values, pixel_attention_mask, len(rows))
    room = sampling.max_length - input_ids.shape[1]
    longest = max(map(len, rows)) + room
    if longest > config.text.max_positions:
        raise NotOnEngineError(
            f"{longest} tokens are more than the model's {config.text.max_positions} positions"
        )
    if sampling.params.stop and not sampling.has_end and len(rows) > 1:
        raise NotOnEngineError("stop_strings without an end token need transformers' loop")
    if sampling.params.repetition_penalty != 1.0:
        # transformers also penalizes the tokens of padding and of images
        if any(len(row) < input_ids.shape[1] for row in rows):
            raise NotOnEngineError("repetition_penalty with padding needs transformers' loop")
        if any(config.image_token_id in row for row in rows) and (
            (config.image_token_id,) not in sampling.bad_words_ids
        ):
            raise NotOnEngineError("repetition_penalty of image tokens needs transformers' loop")
    seeds = torch.randint(2**62, (len(rows),)).tolist()
    numbers = count()
    return [
        Request(
            request_id=str(next(numbers)),
            prompt="",
            prompt_token_ids=row,
            images=_items(row, own, config),
            params=sampling.params,
            seed=seed,
            max_tokens=room,
            bad_words_ids=sampling.bad_words_ids,
        )
        for row, own, seed in zip(rows, pictures, seeds, strict=True)
    ]


def _rows(input_ids: Tensor, attention_mask: Tensor | None, config: ModelConfig) -> list[list[int]]:
    """Return the tokens of each row without its padding."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise NotOnEngineError(
            f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    ids, kept = input_ids.cpu(), attention_mask.bool().cpu()
    if not bool(kept[:, -1].all()) or bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise NotOnEngineError("padding that is not on the left needs transformers' loop")
    vocab_size = config.text.vocab_size
    if bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise NotOnEngineError(f"input_ids must be from 0 to {vocab_size - 1}")
    return [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)]


def _pictures(
    model: Any,
    config: ModelConfig,
    pixel_values: Tensor | None,
    pixel_attention_mask: Tensor | None,
    num_rows: int,
) -> list[list[Picture] | None]:
    """Return the pictures of each row, ``None`` without ``pixel_values``."""
    if pixel_values is None:
        return [None] * num_rows
    try:
        cut = cut_patches(config.vision.patch_size, model.dtype, pixel_values, pixel_attention_mask)
    except ValueError as error:
        raise NotOnEngineError(str(error)) from error
    if len(cut.is_real) != num_rows:
        raise NotOnEngineError(f"pixel_values must have {num_rows} rows, got {len(cut.is_real)}")
    if any(0 in grid for grid in cut.grids):
        raise NotOnEngineError("a picture without a whole patch needs transformers' loop")
    embeddings = model.model.vision_model.embeddings
    positions = patch_positions(embeddings, cut.kept, model.dtype)[cut.kept.flatten(1)]
    counts = [rows * columns for rows, columns in cut.grids]
    patches, places = cut.patches.to(model.device), positions.to(model.device)
    made = [
        Picture(own, ids, _fingerprint(own, ids, grid))
        for own, ids, grid in zip(
            patches.split(counts), places.split(counts), cut.grids, strict=True
        )
    ]
    rest = iter(made)
    return [[next(rest) for _ in range(number)] for number in cut.is_real.sum(1).tolist()]


def _fingerprint(patches: Tensor, positions: Tensor, grid: tuple[int, int]) -> bytes:
    digest = blake2b(repr(grid).encode(), digest_size=16)
    for tensor in (patches, positions):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _items(row: list[int], pictures: list[Picture] | None, config: ModelConfig) -> list[ImageItem]:
    """Return the places of ``pictures`` in ``row``."""
    if pictures is None:
        # An image token without a picture keeps its own embedding
        return []
    latents, image = config.perceiver.num_latents, config.image_token_id
    if row.count(image) != latents * len(pictures):
        raise NotOnEngineError(
            f"a row must have {latents} image tokens for each of its {len(pictures)} pictures, "
            f"got {row.count(image)}"
        )
    try:
        return image_items(row, pictures, image, latents)
    except AssertionError as error:
        raise NotOnEngineError(f"image tokens must be in runs of {latents}") from error
