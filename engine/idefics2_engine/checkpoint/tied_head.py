"""The decision whether the head is the embedding, by config and tensors as in transformers 5.

| ``tie_word_embeddings`` | tensors in the files | the model uses |
|---|---|---|
| true | one of the two | that one as both |
| true | both, with equal values | the embedding as both |
| true | both, with different values | both |
| false or absent | both | both |

Only the top level of ``config.json`` counts. The loader rejects any other set of tensors, where
transformers draws random values with a warning.
"""

import logging
from dataclasses import replace

import torch

from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.checkpoint.tensor_mapping import EMBEDDING, HEAD
from idefics2_engine.checkpoint.tensor_values import read_values
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model_files import printable_path

_logger = logging.getLogger(__name__)


def resolve_tied_head(
    config: ModelConfig, stored: dict[str, StoredTensor]
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Return ``config`` with the flag that fits the tensors ``stored``, and the tensors to load.

    With a tied head, these have the embedding but not the head. If both are stored although
    ``config`` ties them, their values are read and compared. ``stored`` is not changed.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if not config.tie_word_embeddings or HEAD not in stored:
        return config, stored
    if EMBEDDING not in stored:
        only = {EMBEDDING: replace(stored[HEAD], name=EMBEDDING)}
    elif _are_equal(stored[EMBEDDING], stored[HEAD]):
        only = {}
    else:
        _logger.warning(
            "%s: the head differs from the embedding, so both are used, although config.json ties them",
            printable_path(stored[HEAD].file),
        )
        return replace(config, tie_word_embeddings=False), stored
    return config, {name: tensor for name, tensor in stored.items() if name != HEAD} | only


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether both tensors have the same shape and values. Their dtypes may differ."""
    if one.shape != other.shape:
        return False
    a, b = (value for _, value in read_values((one, other)))
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))
