"""The digest of a part of a stage: small enough to keep for a model of any size."""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

SAMPLES = 64
"""Elements of a part that a digest keeps."""


@dataclass(frozen=True)
class Digest:
    """A part of a stage without most of its elements.

    Attributes:
        sha256: SHA-256 of the part's bytes, in hex.
        shape: Shape of the part.
        norms: Euclidean norm of each row, float64.
        samples: ``SAMPLES`` elements at places that depend on the shape alone, float64.
    """

    sha256: str
    shape: tuple[int, ...]
    norms: Tensor
    samples: Tensor

    @classmethod
    def of(cls, part: Tensor) -> "Digest":
        """Return the digest of a matrix."""
        wide = part.double()
        return cls(
            part_sha256(part),
            tuple(part.shape),
            wide.square().sum(-1).sqrt(),
            wide.flatten()[sample_places(tuple(part.shape))],
        )

    def rows(self, count: int) -> list[Tensor]:
        """Return matrices that stand for the first ``count`` rows: their norms, and the samples.

        Samples may be of any row, so there are none if rows are left out.
        """
        norms = self.norms[:count, None]
        is_whole = count == self.shape[0]
        return [norms, self.samples[None] if is_whole else self.samples[None, :0]]


def part_sha256(part: Tensor) -> str:
    """Return the SHA-256 of the dtype, shape and elements of a part."""
    digest = sha256(f"{part.dtype} {tuple(part.shape)}".encode())
    digest.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_places(shape: tuple[int, ...]) -> Tensor:
    """Return the sorted places of the sampled elements in a flat part of ``shape``."""
    size = int(np.prod(shape))
    if size <= SAMPLES:
        return torch.arange(size)
    drawn = np.random.default_rng(list(shape)).choice(size, SAMPLES, replace=False)
    return torch.from_numpy(np.sort(drawn))
