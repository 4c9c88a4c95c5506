"""Rows of a padded batch without their padding, and their places in the batch."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class PackedRows:
    """The kept tokens of B rows of S tokens, which follow each other without padding.

    Attributes:
        shape: (B, S).
        places: (T,) int64, the places of the kept tokens in the flattened batch. ``None`` if all
            are kept.
        cu_seqlens: (B + 1,) int32, the start of each row and the end of the last.
        max_seqlen: The most kept tokens of a row.
        has_gaps: Whether a row has padding between kept tokens. Distances then differ from those
            in the padded batch.
    """

    shape: tuple[int, int]
    places: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    has_gaps: bool

    @classmethod
    def whole(cls, B: int, S: int, device: torch.device) -> "PackedRows":
        """Return the rows of a batch without padding."""
        offsets = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=device)
        return cls((B, S), None, offsets[: B + 1], S, False)

    @classmethod
    def from_mask(cls, kept: Tensor) -> "PackedRows":
        """Build from the mask ``kept`` (B, S), which is true or not zero for kept tokens."""
        kept = kept.bool()
        B, S = kept.shape
        lengths = kept.sum(1)
        # A run begins at each kept token whose predecessor is not kept
        runs = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
        # One transfer from the device for all three
        total, longest, most_runs = torch.stack([lengths.sum(), lengths.max(), runs.max()]).tolist()
        if total == B * S:
            return cls.whole(B, S, kept.device)
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        places = kept.flatten().nonzero()[:, 0]
        return cls((B, S), places, offsets, longest, most_runs > 1)

    def to(self, device: torch.device | str) -> "PackedRows":
        """Return the same on ``device``; accelerate calls this between layers on several GPUs."""
        places = None if self.places is None else self.places.to(device)
        return replace(self, places=places, cu_seqlens=self.cu_seqlens.to(device))

    def pack(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, S, ...) to its kept tokens (T, ...)."""
        flat: Tensor = x.flatten(0, 1)
        if self.places is None:
            return flat
        packed: Tensor = _Pack.apply(flat, self.places)  # type: ignore[no-untyped-call]
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """Map ``packed`` (T, ...) to (B, S, ...), with zeros for padding."""
        B, S = self.shape
        if self.places is not None:
            flat = packed.new_zeros(B * S, *packed.shape[1:])
            flat[self.places] = packed
            packed = flat
        return packed.view(B, S, *packed.shape[1:])


class _Pack(torch.autograd.Function):
    """The rows of a tensor at different places.

    Autograd's own gradient of an index sorts the places, to add up those that repeat.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor) -> Tensor:
        """Return the rows of ``flat`` (R, ...) at ``places`` (T,)."""
        ctx.save_for_backward(places)
        ctx.num_rows = flat.shape[0]
        return flat[places]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of ``flat``, which is zero at all other places."""
        (places,), (dpacked,) = ctx.saved_tensors, grads
        dflat = dpacked.new_zeros(ctx.num_rows, *dpacked.shape[1:])
        dflat[places] = dpacked
        return dflat, None


class RowsOfMasks:
    """The packed rows of masks that do not change, computed once for all layers."""

    def __init__(self) -> None:
        self._rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def remember(self, mask: Tensor) -> None:
        """Compute the rows of ``mask`` once from now on. It must not change."""
        self._rows[mask] = {}

    def rows(self, mask: Tensor, length: int) -> PackedRows:
        """Return the rows of the first ``length`` columns of ``mask`` (B, S)."""
        known: dict[int, PackedRows] = self._rows.get(mask, {})
        if length not in known:
            known[length] = PackedRows.from_mask(mask[:, :length])
        return known[length]


class LeftPadding:
    """The padding on the left of rows that masks (B, 1, Q, S) of decoding were made from."""

    def __init__(self) -> None:
        self._sources: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def remember(self, mask: Tensor, kept: Tensor | None) -> None:
        """Remember that ``mask`` hides what follows, and what ``kept`` (B, S) does not keep."""
        self._sources[mask] = kept

    def of(self, mask: Tensor) -> Tensor | None:
        """Return the padding (B,) int64 of the rows of ``mask``.

        The result is ``None`` if ``mask`` is none of the remembered, if a row has padding behind a
        kept token, or if one of the last Q tokens is padding.
        """
        return self._count(mask) if mask in self._sources else None

    def _count(self, mask: Tensor) -> Tensor | None:
        kept, (B, _, Q, S) = self._sources[mask], mask.shape
        if kept is None:
            return torch.zeros(B, dtype=torch.int64, device=mask.device)
        return count_left_padding(kept, Q) if kept.shape == (B, S) else None


def count_left_padding(kept: Tensor, Q: int) -> Tensor | None:
    """Return the padding (B,) int64 on the left of rows, of which ``kept`` (B, S) keeps the rest.

    The result is ``None`` if a row has padding behind a kept token, or among the last Q tokens.
    """
    S = kept.shape[1]
    padding: Tensor = S - kept.sum(1)
    is_left = (kept == (torch.arange(S, device=kept.device) >= padding[:, None])).all()
    return padding if is_left & (padding <= S - Q).all() else None
