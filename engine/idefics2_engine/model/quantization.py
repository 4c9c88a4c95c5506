"""Quantization settings, from the arguments of ``LLM`` and from a checkpoint's ``config.json``."""

from collections.abc import Sequence
from dataclasses import dataclass

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.json_file import Section

PARTS = ("vision", "connector", "text")
"""The parts whose linear layers can be in NF4. Embeddings, norms and the head never are."""


@dataclass(frozen=True)
class Quantization:
    """A request to quantize the linear layers of ``parts`` to NF4.

    ``double_quant`` says whether the absolute maxima are quantized as well.

    Raises:
        ConfigError: ``parts`` are empty or contain an unknown part.
    """

    parts: tuple[str, ...] = PARTS
    double_quant: bool = True

    def __post_init__(self) -> None:  # noqa: D105
        if not self.parts or not set(self.parts) <= set(PARTS):
            wanted = ", ".join(map(repr, PARTS))
            raise ConfigError(f"quantized_parts must be one or more of {wanted}, got {self.parts}")

    @classmethod
    def from_arguments(
        cls, quantization: str | None, quantized_parts: Sequence[str] | None, double_quant: bool
    ) -> "Quantization | None":
        """Build from arguments of ``LLM``; raise ``ConfigError`` if they contradict each other."""
        if quantization is None:
            if quantized_parts is not None or not double_quant:
                raise ConfigError("quantized_parts and double_quant must come with quantization")
            return None
        if quantization != "nf4":
            raise ConfigError(f"quantization must be 'nf4', got {short_repr(quantization)}")
        if quantized_parts is None:
            return cls(double_quant=double_quant)
        if isinstance(quantized_parts, str):
            raise ConfigError(f"quantized_parts must be a list, got {short_repr(quantized_parts)}")
        return cls(tuple(quantized_parts), double_quant)


def is_nf4(config: Section) -> bool:
    """Return whether ``config.json`` describes NF4 weights of bitsandbytes.

    The files show which tensors are in NF4. ``llm_int8_skip_modules`` does not, because its
    matching has changed between releases of transformers.

    Raises:
        ConfigError: The checkpoint is quantized in another way.
    """
    if config.values.get("quantization_config") is None:
        return False
    section = config.section("quantization_config")
    by_4bit, by_8bit = (
        any(section.flag(key) for key in (f"load_in_{bits}bit", f"_load_in_{bits}bit"))
        for bits in (4, 8)
    )
    method = section.values.get("quant_method")
    # The oldest configs have no quant_method
    if method != "bitsandbytes" and (method is not None or not by_4bit):
        raise section.error("quant_method", "'bitsandbytes', with weights in NF4", method)
    if by_8bit:
        raise ConfigError(f"{section.name}: load_in_8bit: weights must be in NF4, got int8")
    if not by_4bit:
        raise section.error("load_in_4bit", "true", section.values.get("load_in_4bit"))
    # transformers has the same default
    kind = section.values.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise section.error("bnb_4bit_quant_type", "'nf4'", kind)
    section.require("bnb_4bit_quant_storage", "uint8")
    skipped = section.values.get("llm_int8_skip_modules")
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
    ):
        raise section.error("llm_int8_skip_modules", "names of modules", skipped)
    return True


def bitsandbytes_config(
    dtype: str, double_quant: bool, skipped: Sequence[str]
) -> dict[str, object]:
    """Return transformers' ``quantization_config`` for NF4 weights that compute in ``dtype``.

    ``skipped`` are the modules that stay in 16 bit, with their submodules.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(skipped),
    }
