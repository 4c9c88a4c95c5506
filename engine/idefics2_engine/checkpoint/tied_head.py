"""Whether the head is the embedding, decided by config and tensors as in transformers 5.

| ``tie_word_embeddings`` | tensors in the files | the model uses |
|---|---|---|
| true | one of the two | that one as both |
| true | both, with equal values | the embedding as both |
| true | both, with different values | both |
| false or absent | both | both |

Only the top level of ``config.json`` counts. Any other set of tensors is refused; transformers
draws what is missing at random and warns.
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
    """Return ``config`` with the flag that fits the tensors ``stored``, and the tensors it needs.

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
    """Whether both have the same values, whatever their types."""
    if one.shape != other.shape:
        return False
    a, b = (value for _, value in read_values((one, other)))
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))
