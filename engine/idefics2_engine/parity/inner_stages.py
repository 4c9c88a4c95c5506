"""Stages inside a layer, which are recorded on request.

They are where all implementations have the same tensor, also if they compute several at once:
before and after the linear layers. ``attention`` is the heads' outputs side by side, before the
projection, so it includes the rotary positions. ``projection`` and ``mlp`` are branches, before
they are added to the residual. Keys of the text model are those before the rotary positions.
"""

import pathlib
from collections.abc import Iterable

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.parity import stages

NORM = "norm"
QUERIES = "queries"
KEYS = "keys"
VALUES = "values"
ATTENTION = "attention"
PROJECTION = "projection"
MLP_NORM = "mlp norm"
MLP = "mlp"
# Of the patches that the latents of the perceiver attend to
PATCHES_NORM = f"{stages.OF_PATCHES} norm"
PATCHES_KEYS = f"{stages.OF_PATCHES} keys"
PATCHES_VALUES = f"{stages.OF_PATCHES} values"

ALL = "all"
"""The request for the inner stages of all layers."""

_AFTER_NORM = (QUERIES, KEYS, VALUES, ATTENTION, PROJECTION, MLP_NORM, MLP)
IN_LAYER = (NORM, *_AFTER_NORM)
IN_PERCEIVER_LAYER = (PATCHES_NORM, PATCHES_KEYS, PATCHES_VALUES, NORM, *_AFTER_NORM)


def inner_stages(layer: str) -> list[str]:
    """Return the names of the stages inside ``layer``, such as ``text layer 2 attention``."""
    parts = IN_PERCEIVER_LAYER if layer.startswith("perceiver") else IN_LAYER
    return [f"{layer} {part}" for part in parts]


def stages_of(folder: pathlib.Path, inside: Iterable[str] = ()) -> list[str]:
    """Return the stages of the checkpoint in ``folder`` in order.

    Those inside the layers that ``inside`` names are among them, or those inside ``ALL`` layers.

    Raises:
        ConfigError: The model has no such layer, or its config is invalid.
    """
    config = ModelConfig.load(folder)
    order = stages.stage_order(config)
    layers = [stage for stage in order if stages.is_layer(stage)]
    wanted = set(inside)
    for name in sorted(wanted - {ALL}):
        if name not in layers:
            raise ConfigError(
                f"a layer to look inside must be {ALL} or one from {_ranges(config)}, "
                f"got {short_repr(name)}"
            )
    found = []
    for stage in order:
        if stage in layers and (ALL in wanted or stage in wanted):
            found += inner_stages(stage)
        found.append(stage)
    return found


def _ranges(config: ModelConfig) -> str:
    counts = {
        "vision": config.vision.num_layers,
        "perceiver": config.perceiver.num_layers,
        "text": config.text.num_layers,
    }
    return ", ".join(f"{part} layer 0 to {count - 1}" for part, count in counts.items())
