"""Hugging Face's padded form, run by the packed model: for parity with transformers and for training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idefics2_engine.batch import TextBatch
from idefics2_engine.images import position_ids
from idefics2_engine.model import Idefics2, next_token_loss


@dataclass(frozen=True)
class PaddedOutput:
    """What transformers' model returns: ``loss`` is ``None`` without labels; padded rows of ``logits`` are zero."""

    logits: Tensor  # (B, S, vocabulary)
    loss: Tensor | None
    image_features: Tensor | None  # (tiles, latents, hidden)


def forward_padded(
    model: Idefics2,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    pixel_attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    image_features: Tensor | None = None,
) -> PaddedOutput:
    """Run ``model`` on what transformers' processor returns.

    Args:
        model: The packed model.
        input_ids: (B, S) int64, padded on either side.
        attention_mask: (B, S), zero on padding; all ones if ``None``.
        pixel_values: (B, images, 3, height, width) normalised, padded on the right and bottom.
        pixel_attention_mask: (B, images, height, width), zero on padding and all zero for an image that is not there;
            all ones if ``None``.
        labels: (B, S) int64, -100 where no loss is wanted.
        image_features: Features of an earlier call, in place of ``pixel_values``.
    """
    if pixel_values is not None and image_features is not None:
        raise ValueError("give pixel_values or image_features, not both")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("attention_mask must keep at least one token a row")
    batch = TextBatch.from_ids(
        [row[keep].tolist() for row, keep in zip(input_ids, kept, strict=True)]
    )
    batch = batch.to(input_ids.device)
    if pixel_values is not None:
        image_features = encode_padded(model, pixel_values, pixel_attention_mask)
    slots = int((input_ids[kept] == model.config.image_token_id).sum())
    if image_features is not None and slots != image_features.shape[:-1].numel():
        raise ValueError(
            "input_ids must have an image token for each image feature, "
            f"wanted {image_features.shape[:-1].numel()}, got {slots}"
        )
    packed = model(batch, image_features)
    loss = None
    if labels is not None:
        loss = next_token_loss(packed, labels[kept], batch)
    logits = packed.new_zeros(*input_ids.shape, packed.shape[-1])
    logits[kept] = packed
    return PaddedOutput(logits, loss, image_features)


def encode_padded(
    model: Idefics2, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None
) -> Tensor:
    """Encode the real images of a padded batch to (tiles, latents, hidden), sample by sample."""
    size = model.config.vision.patch_size
    pixels = pixel_values.flatten(0, 1).to(model.dtype)
    if pixel_attention_mask is None:
        pixel_attention_mask = torch.ones_like(pixel_values[:, :, 0], dtype=torch.int64)
    mask = pixel_attention_mask.flatten(0, 1).bool()
    mask = (
        mask.unfold(1, size, size).unfold(2, size, size).flatten(3).all(-1)
    )  # (images, rows, columns)
    patches = pixels.unfold(2, size, size).unfold(
        3, size, size
    )  # (images, C, rows, columns, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)[mask]
    grids = [
        (rows, columns)
        for rows, columns in zip(
            mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist(), strict=True
        )
        if rows
    ]
    if not grids:
        raise ValueError("pixel_attention_mask must keep a whole patch of some image, got none")
    counts = [rows * columns for rows, columns in grids]
    ids = [position_ids(*grid, model.config.vision.grid) for grid in grids]
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return model.encode(
        patches,
        torch.cat([torch.from_numpy(i) for i in ids]).to(pixels.device),
        offsets.to(pixels.device),
        max(counts),
    )
