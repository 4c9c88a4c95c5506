"""The packed model on transformers' padded inputs, for comparison and training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idefics2_engine.images.tiling import position_ids
from idefics2_engine.model.batch import TextBatch, cumulative
from idefics2_engine.model.idefics2 import IGNORED_LABEL, Idefics2, next_token_loss


@dataclass(frozen=True)
class PaddedOutput:
    """The output of the model in transformers' format.

    Logits of padding are zero. ``loss`` is ``None`` without labels.
    """

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
    """Run ``model`` on the output of transformers' processor.

    Padding is not computed, so it has no logits and no loss, whatever its labels. transformers
    computes it, and its loss includes the first token of a row that is padded on the left. The
    losses are equal if that token has the label -100. With padding on the right, they are equal if
    padding has that label.

    Args:
        model: The packed model.
        input_ids: (B, S) int64, padded on either side.
        attention_mask: (B, S), zero on padding; all ones if ``None``.
        pixel_values: (B, images, 3, height, width) normalized, padded on the right and bottom; an
            image of zeros alone is not there.
        pixel_attention_mask: (B, images, height, width), zero on padding and all zero for an image
            that is not there; all ones if ``None``.
        labels: (B, S) int64, -100 where no loss is wanted.
        image_features: Features of an earlier call, in place of ``pixel_values``.

    Raises:
        ValueError: Shapes differ; an id or a label is none of the vocabulary; the tokens that the
            mask keeps are not one run in each row; an image's mask is no rectangle; or image tokens
            and features differ in number.
    """
    if pixel_values is not None and image_features is not None:
        raise ValueError("give pixel_values or image_features, not both")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    kept = attention_mask.bool()
    _check_text(model, input_ids, kept, labels)
    batch = TextBatch.from_ids(
        [row[keep].tolist() for row, keep in zip(input_ids, kept, strict=True)]
    )
    batch = batch.to(input_ids.device)
    if pixel_values is not None:
        image_features = encode_padded(model, pixel_values, pixel_attention_mask)
    image_tokens = int((input_ids[kept] == model.config.image_token_id).sum())
    if image_features is not None and image_tokens != image_features.shape[:-1].numel():
        raise ValueError(
            "input_ids must have an image token for each image feature, "
            f"wanted {image_features.shape[:-1].numel()}, got {image_tokens}"
        )
    packed = model(batch, image_features)
    loss = None
    if labels is not None:
        loss = next_token_loss(packed, labels[kept], batch)
    logits = packed.new_zeros(*input_ids.shape, packed.shape[-1])
    logits[kept] = packed
    return PaddedOutput(logits, loss, image_features)


def _check_text(model: Idefics2, input_ids: Tensor, kept: Tensor, labels: Tensor | None) -> None:
    """Reject inputs that ``forward_padded`` cannot compute as transformers does."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be whole numbers (B, S), got {tuple(input_ids.shape)} of {input_ids.dtype}"
        )
    for name, tensor in (("attention_mask", kept), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    # A run begins at each kept token whose predecessor is not kept
    runs = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    if bool((runs != 1).any()):
        row = int((runs != 1).nonzero()[0])
        raise ValueError(
            "attention_mask must keep one run of tokens in each row, with padding on its sides alone, "
            f"got {int(runs[row])} runs in row {row}"
        )
    last = model.config.text.vocab_size - 1
    outside = input_ids[kept & ((input_ids < 0) | (input_ids > last))]
    if len(outside):
        raise ValueError(f"input_ids must be from 0 to {last}, got {int(outside[0])}")
    if labels is not None:
        wrong = labels[kept & (labels != IGNORED_LABEL) & ((labels < 0) | (labels > last))]
        if len(wrong):
            raise ValueError(
                f"labels must be from 0 to {last}, or {IGNORED_LABEL}, got {int(wrong[0])}"
            )


def encode_padded(
    model: Idefics2, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None
) -> Tensor:
    """Encode the real images of a padded batch to (tiles, latents, hidden), sample by sample.

    Raises:
        ValueError: Shapes differ, an image's mask is no rectangle from its top left corner, or
            there is no image.
    """
    cut = cut_patches(
        model.config.vision.patch_size, model.dtype, pixel_values, pixel_attention_mask
    )
    grids = [grid for grid in cut.grids if grid[0]]
    if not grids:
        raise ValueError("pixel_attention_mask must keep a whole patch of some image, got none")
    counts = [rows * columns for rows, columns in grids]
    ids = [position_ids(*grid, model.config.vision.grid) for grid in grids]
    device = cut.patches.device
    return model.encode(
        cut.patches,
        torch.cat([torch.from_numpy(i) for i in ids]).to(device),
        cumulative(counts).to(device),
        max(counts),
    )


@dataclass(frozen=True)
class CutPatches:
    """The N real images of a padded batch in P patches, without padding."""

    patches: Tensor  # (P, channels x rows x columns of a patch)
    kept: Tensor  # (N, R, C), the patches of each image
    grids: list[tuple[int, int]]  # rows and columns of each image
    is_real: Tensor  # (B, images), which images are there


def cut_patches(
    size: int,
    dtype: torch.dtype,
    pixel_values: Tensor,
    pixel_attention_mask: Tensor | None = None,
) -> CutPatches:
    """Cut the real images of a padded batch into patches of ``size`` pixels, in ``dtype``.

    Raises:
        ValueError: Shapes differ, or an image's mask is no rectangle from its top left corner.
    """
    if pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values must be (B, images, 3, height, width), got {tuple(pixel_values.shape)}"
        )
    wanted = pixel_values[:, :, 0].shape
    if pixel_attention_mask is None:
        pixel_attention_mask = pixel_values.new_ones(wanted)
    if pixel_attention_mask.shape != wanted:
        raise ValueError(
            f"pixel_attention_mask must be {tuple(wanted)} for these pixel_values, "
            f"got {tuple(pixel_attention_mask.shape)}"
        )
    pixels = pixel_values.flatten(0, 1).to(dtype)
    # transformers drops black images, with a mask and without
    is_real = (pixels != 0).flatten(1).any(1)
    pixels = pixels[is_real]
    mask = pixel_attention_mask.flatten(0, 1)[is_real].bool()
    mask = (
        mask.unfold(1, size, size).unfold(2, size, size).flatten(3).all(-1)
    )  # (images, rows, columns)
    patches = pixels.unfold(2, size, size).unfold(
        3, size, size
    )  # (images, C, rows, columns, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)[mask]
    rows, columns = mask.any(2).sum(1), mask.any(1).sum(1)
    down, across = (torch.arange(n, device=mask.device) for n in mask.shape[1:])
    in_rows, in_columns = down < rows[:, None], across < columns[:, None]
    if not torch.equal(mask, in_rows[:, :, None] & in_columns[:, None, :]):
        raise ValueError(
            "pixel_attention_mask must keep a rectangle of patches from the top left corner of each "
            "image, got another shape"
        )
    grids = list(zip(rows.tolist(), columns.tolist(), strict=True))
    return CutPatches(patches, mask, grids, is_real.view(pixel_values.shape[:2]))
