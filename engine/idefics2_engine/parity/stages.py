"""The stages of a computation, in order, and what a row of each stage is.

A stage of a case is a list of parts, each a matrix. A part belongs to an image, to a tile, or to
the tokens: those of the prompt, then those of the answer. A row of a part is a row of pixels, a
patch, a latent or a token.
"""

from idefics2_engine.model.config import ModelConfig

DECODE = "decode"
TILES = "tiles"
TOKEN_IDS = "token ids"
PATCH_EMBEDDING = "patch embedding"
VISION_NORM = "vision norm"
PROJECTION = "projection"
PERCEIVER_NORM = "perceiver norm"
TEXT_EMBEDDING = "text embedding"
TEXT_NORM = "text norm"
LOGITS = "logits"
TOKENS = "tokens"
TEXT = "text"

OF_PATCHES = "patches"
"""Part of the names of the perceiver's stages whose rows are patches, not latents."""

INPUTS = (DECODE, TILES, TOKEN_IDS)
"""Stages that are computed before any operation of the model."""

EXACT = (*INPUTS, TOKENS, TEXT)
"""Stages without rounding. Tokens may still part where two logits are nearly equal."""


def vision_layer(layer: int) -> str:
    """Return the name of the stage after a layer of the vision tower."""
    return f"vision layer {layer}"


def perceiver_layer(layer: int) -> str:
    """Return the name of the stage after a layer of the perceiver."""
    return f"perceiver layer {layer}"


def text_layer(layer: int) -> str:
    """Return the name of the stage after a layer of the text model."""
    return f"text layer {layer}"


def stage_order(config: ModelConfig) -> list[str]:
    """Return the stages of a model in the order in which they are computed."""
    return [
        DECODE,
        TILES,
        TOKEN_IDS,
        PATCH_EMBEDDING,
        *map(vision_layer, range(config.vision.num_layers)),
        VISION_NORM,
        PROJECTION,
        *map(perceiver_layer, range(config.perceiver.num_layers)),
        PERCEIVER_NORM,
        TEXT_EMBEDDING,
        *map(text_layer, range(config.text.num_layers)),
        TEXT_NORM,
        LOGITS,
        TOKENS,
        TEXT,
    ]


def is_layer(stage: str) -> bool:
    """Return whether ``stage`` is the output of a layer."""
    return stage.partition(" layer ")[2].isdecimal()


def is_inside(stage: str) -> bool:
    """Return whether ``stage`` is inside a layer, such as ``text layer 2 attention``."""
    return " layer " in stage and not is_layer(stage)


def unit(stage: str) -> str:
    """Return what a row of ``stage`` is: ``pixels``, ``patch``, ``latent`` or ``token``."""
    if stage in (DECODE, TILES):
        return "pixels"
    if stage.startswith("perceiver"):
        return "patch" if f" {OF_PATCHES} " in stage else "latent"
    if stage == PROJECTION or stage.startswith(("patch", "vision")):
        return "patch"
    return "token"
