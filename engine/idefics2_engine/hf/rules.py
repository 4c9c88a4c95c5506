"""The two rules by which transformers' Idefics2 and the trained one differ.

| | ``"trained"`` | ``"transformers"`` |
|---|---|---|
| perceiver's ``rms_norm_eps``, if the checkpoint's config has none | the text model's (1e-5) | 1e-6 |
| position ids of patches | in float32, as in training | as the installed release computes them |

The position ids differ for sides of 49 and 58 patches, and in release 5.17 for all dtypes below
float32.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.models.idefics2 import modeling_idefics2

from idefics2_engine.images.tiling import position_ids

Rules = Literal["trained", "transformers"]
TRAINED: Rules = "trained"
TRANSFORMERS: Rules = "transformers"


def check_rules(name: object) -> Rules:
    """Return ``name`` if it is one of the two rules.

    Raises:
        ValueError: It is not.
    """
    if name not in get_args(Rules):
        raise ValueError(f"rules must be 'trained' or 'transformers', got {name!r}")
    return name  # type: ignore[return-value]


def patch_positions(embeddings: nn.Module, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the position ids (N, R * C) of patches by the rules of ``embeddings``.

    Args:
        embeddings: transformers' ``Idefics2VisionEmbeddings``. Without ``rules``, transformers'
            apply.
        kept: (N, R, C), the patches of each image that are no padding. Others get position 0.
        dtype: Dtype of the pixels.
    """
    if getattr(embeddings, "rules", TRANSFORMERS) == TRAINED:
        found = _trained(kept, int(embeddings.num_patches_per_side))  # type: ignore[arg-type]
        if found is not None:
            return found
    return _transformers(embeddings, kept, dtype)


def _trained(kept: Tensor, grid: int) -> Tensor | None:
    """Return the trained positions, or ``None`` for larger images than the model was trained on."""
    _, R, C = kept.shape
    if max(R, C) > grid:
        return None
    table = _table(grid, str(kept.device))
    rows, columns = kept[:, :, 0].sum(1), kept[:, 0].sum(1)
    ids = table[rows, :R, None] * grid + table[columns, None, :C]
    return torch.where(kept, ids, 0).flatten(1)


@cache
def _table(grid: int, device: str) -> Tensor:
    """Return the positions of patches along a side, (count, place), for counts up to ``grid``."""
    table = torch.zeros(grid + 1, grid, dtype=torch.int64)
    for count in range(1, grid + 1):
        table[count, :count] = torch.from_numpy(position_ids(count, 1, grid) // grid)
    return table.to(device)


def _transformers(embeddings: Any, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the positions that transformers looks up, by its own code.

    The layers of the stand-in compute nothing: one returns zeros, the other the ids themselves.
    """
    N, R, C = kept.shape
    size = embeddings.patch_size
    zeros = torch.zeros(N, 1, R, C, dtype=torch.int64, device=kept.device)
    stand_in: Any = SimpleNamespace(
        patch_size=size,
        num_patches_per_side=embeddings.num_patches_per_side,
        patch_embedding=lambda _pixels: zeros,
        position_embedding=lambda ids: ids[..., None],
    )
    pixels = torch.empty(1, dtype=dtype, device=kept.device).expand(N, 3, R * size, C * size)
    forward: Any = modeling_idefics2.Idefics2VisionEmbeddings.forward
    found: Tensor = forward(stand_in, pixels, kept)[..., 0]
    return found


def set_perceiver_eps(model: nn.Module, eps: float) -> None:
    """Let the perceiver of ``model`` normalize with ``eps``, and its config say so."""
    config: Any = model.config
    config.perceiver_config.rms_norm_eps = eps
    for module in model.modules():
        if isinstance(module, modeling_idefics2.Idefics2RMSNorm):
            module.variance_epsilon = eps
