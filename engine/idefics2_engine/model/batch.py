"""Inputs and metadata of one forward pass, built on the host and passed down as arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.images.tiling import ImageConfig, Tile


class _Movable:
    """A frozen dataclass whose tensors move to a device together."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor on ``device``, without waiting for the transfers."""
        moved = {
            field.name: _moved(getattr(self, field.name), torch.device(device))
            for field in fields(self)  # type: ignore[arg-type]
        }
        return type(self)(**moved)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, _Movable):
        return value.to(device)
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


@dataclass(frozen=True)
class ImageBatch(_Movable):
    """N tiles of any sizes, packed into P patches without padding.

    Attributes:
        pixels: RGB values of each tile, cropped to whole patches, row by row.
        widths: Patches in a row of each tile.
        position_ids: row * grid + column on the trained grid.
        cu_seqlens: First patch of each tile, then P.
        max_seqlen: Patches of the largest tile.
        rescale_factor: Multiplied with the pixels before normalization.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    pixels: Tensor  # (P * patch_size**2 * 3,) uint8
    widths: Tensor  # (N,) int32
    position_ids: Tensor  # (P,) int64
    cu_seqlens: Tensor  # (N + 1,) int32
    max_seqlen: int
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_tiles(
        cls,
        tiles: Sequence[Tile],
        config: ImageConfig | None = None,
        pixels: Tensor | None = None,
    ) -> "ImageBatch":
        """Pack one or more ``tiles`` on the CPU.

        Args:
            tiles: The tiles.
            config: Normalization of the pixels, if it is not the default.
            pixels: The packed pixels, on any device, if they were packed before.
        """
        patches = [tile.num_patches for tile in tiles]
        if pixels is None:
            pixels = torch.from_numpy(np.concatenate([t.patch_pixels().ravel() for t in tiles]))
        batch = cls(
            pixels=pixels,
            widths=torch.tensor([tile.grid[1] for tile in tiles], dtype=torch.int32),
            position_ids=torch.from_numpy(np.concatenate([tile.position_ids() for tile in tiles])),
            cu_seqlens=cumulative(patches),
            max_seqlen=max(patches),
        )
        if config is None:
            return batch
        return replace(
            batch, rescale_factor=config.rescale_factor, mean=config.mean, std=config.std
        )


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture in normalized patches, which the engine takes in place of a tile.

    Attributes:
        patches: Values of each patch, channels x rows x columns, in the model's dtype.
        position_ids: row * grid + column on the trained grid.
        fingerprint: 128-bit hash; pictures with the same hash have the same embeddings.
    """

    patches: Tensor  # (P, patch_dim)
    position_ids: Tensor  # (P,) int64
    fingerprint: bytes

    @property
    def num_patches(self) -> int:
        """Number of patches."""
        return len(self.patches)


@dataclass(frozen=True)
class PagedView(_Movable):
    """Places in the KV cache: where new tokens are written and what each sequence reads.

    Attributes:
        slots: page * page size + offset of each new token.
        block_table: Pages of each sequence.
        context_lens: Keys of each sequence, this step's included.
        shared_prefixes: Prefixes that decoding sequences share, for ``Ops.paged_attention``.
    """

    slots: Tensor  # (T,) int32 or int64
    block_table: Tensor  # (B, W) int32
    context_lens: Tensor  # (B,) int32
    shared_prefixes: Tensor | None = None  # (B, 6) int32


@dataclass(frozen=True)
class TextBatch(_Movable):
    """B sequences packed into T tokens, with or without a KV cache.

    ``logits_indices`` are the tokens that get logits; all of them if ``None``. ``feature_rows`` are
    the rows of the image features for image tokens and -1 for other tokens. If ``None``, the image
    tokens take the features in order.
    """

    input_ids: Tensor  # (T,) int32 or int64
    positions: Tensor  # (T,) int32 or int64
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    logits_indices: Tensor | None = None
    paged: PagedView | None = None
    feature_rows: Tensor | None = None  # (T,) int32

    @classmethod
    def from_ids(cls, sequences: Sequence[Sequence[int]]) -> "TextBatch":
        """Pack non-empty ``sequences`` without a KV cache, with logits for every token."""
        lengths = [len(ids) for ids in sequences]
        return cls(
            input_ids=torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens=cumulative(lengths),
            max_seqlen=max(lengths),
        )


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Return the offsets (N + 1,) of parts with these lengths (N,)."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
