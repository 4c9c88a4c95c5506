"""Loading of an adapter, and which of its pairs are merged."""

from collections.abc import Collection, Mapping
from pathlib import Path

from idefics2_engine.checkpoint.lora import Adapter
from idefics2_engine.checkpoint.parameter_filler import require_finite
from idefics2_engine.checkpoint.tensor_mapping import EMBEDDING, HEAD, HubTensor
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model_files import printable_path


def load_adapter(
    folder: Path, config: ModelConfig, places: dict[str, HubTensor], check_finite: bool
) -> Adapter:
    """Read the adapter in ``folder`` and check that it fits the checkpoint's ``places``."""
    adapter = Adapter.load(folder)
    if config.tie_word_embeddings and adapter.changed & {EMBEDDING, HEAD}:
        raise CheckpointError(
            f"{adapter.file}: changes the embedding or the head, which are one in this model: not supported"
        )
    adapter.check(places)
    if check_finite:
        for name, tensor in adapter.values.items():
            require_finite(adapter.stored[name], tensor)
    return adapter


def weights_beside(
    adapter: Adapter | None,
    places: Mapping[str, HubTensor],
    stored_nf4: Collection[str],
    in_nf4: Collection[str],
    merge: bool | None,
) -> frozenset[str]:
    """Return the names of the weights beside which ``adapter`` keeps its pairs.

    Embeddings and the head are not among them: they are never in NF4, and their pairs are merged.

    Args:
        adapter: The adapter, if any.
        places: The checkpoint's tensors by name.
        stored_nf4: Names of the weights that the checkpoint has in NF4.
        in_nf4: Names of the weights that the model has in NF4.
        merge: Whether to merge into all weights or none. If ``None``, into those not ``in_nf4``.

    Raises:
        CheckpointError: The adapter replaces a weight that the checkpoint has in NF4.
        ConfigError: The adapter is DoRA and would be kept beside a weight.
    """
    if adapter is None:
        return frozenset()
    for name in sorted(adapter.whole & set(stored_nf4)):
        if places[name].is_linear:
            raise CheckpointError(
                f"{adapter.file}: must not hold {name!r} whole, as the checkpoint has it in NF4"
            )
    if merge:
        return frozenset()
    linear = (name for name in adapter.paired if places[name].is_linear)
    beside = frozenset(name for name in linear if merge is False or name in in_nf4)
    if beside and adapter.is_dora:
        raise ConfigError(
            f"{adapter.file}: use_dora must be merged, got {min(beside)!r:.200} to be kept unmerged: merge it into "
            "16-bit weights, or use merge_adapter=True, which merges before quantization"
        )
    return beside


def describe(folder: Path, adapter: Adapter, beside: Collection[str]) -> str:
    """Return the adapter's ``folder``, and how many weights it changes in which way."""
    merged = len(adapter.changed) - len(beside)
    return f"{printable_path(folder)} (weights merged or replaced {merged}, unmerged {len(beside)})"
