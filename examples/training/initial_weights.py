"""Initial weights for training, scaled so that a small model learns to see in minutes."""

import torch
from torch import Tensor

from idefics2_engine.model.idefics2 import Idefics2

# The standard deviation in Idefics2.init_weights
_INIT_STD = 0.02
_EMBEDDING_STD = 0.2
_POSITION_SCALE = 0.5
_BRANCH_ENDS = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")


@torch.no_grad()
def init_for_training(model: Idefics2, seed: int) -> None:
    """Draw weights of ``model``: unit gain for each product, less at the end of a residual branch.

    The usual standard deviation of 0.02 is far from that in a narrow model. Position embeddings
    start as sines and cosines of row and column.
    """
    model.init_weights(seed, _INIT_STD)
    depth = len(model.text.layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "patch_embedding.weight")):
            std = parameter.shape[1] ** -0.5
            if name.endswith(_BRANCH_ENDS) and "layers" in name:
                std /= (2 * depth) ** 0.5
            parameter.mul_(std / _INIT_STD)
    model.text.embedding.mul_(_EMBEDDING_STD / _INIT_STD)
    vision = model.config.vision
    model.vision.position_embedding.copy_(_POSITION_SCALE * _waves(vision.grid, vision.hidden_size))


def _waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of row and column at falling frequencies: (side * side, width)."""
    frequencies = 1.5 * 16.0 ** -torch.linspace(0, 1, width // 4 + 1)[:-1]
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)
