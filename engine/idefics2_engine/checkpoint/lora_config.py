"""The ``adapter_config.json`` of a LoRA or DoRA adapter in PEFT's format."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from idefics2_engine.checkpoint.name_pattern import NamePattern
from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.json_file import Section, printable, read_json
from idefics2_engine.model_files import ADAPTER_CONFIG, printable_path, why_no_adapter

_Value = TypeVar("_Value")

_MOST_RANK = 1 << 16
# The 8B model has 410 linear layers, each of which may be matched with all patterns
_MOST_PATTERNS = 4096
# A pattern with a quantifier is matched by a Python loop over the name, which is slower
_MOST_STARRED = 64
# These initializations leave the base weights unchanged. Others, like PiSSA, change them
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# These keys do not affect the merged weights. The names in the weights' file show which modules
# were trained, and there is no dropout in inference
_SILENT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    ]
)
_READ = frozenset(
    [
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    ]
)


@dataclass(frozen=True)
class AdapterConfig:
    """The ranks, the scales and the modules trained whole of ``adapter_config.json``.

    Attributes:
        path: The file.
        r: Rank of the modules that no pattern of ``ranks`` fits.
        alpha: Numerator of the scale of the modules that no pattern of ``alphas`` fits.
        rank_stabilized: Whether the scale is alpha / sqrt(r), not alpha / r.
        dora: Whether rows of changed weights are scaled to trained magnitudes.
        ranks: Ranks by pattern of a module's name. The first pattern that fits counts.
        alphas: Numerators by pattern, in the same way.
        saved: Endings of the names of modules that were trained whole.
    """

    path: Path
    r: int
    alpha: float
    rank_stabilized: bool
    dora: bool
    ranks: Sequence[tuple[NamePattern, int]]
    alphas: Sequence[tuple[NamePattern, float]]
    saved: Sequence[str]

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig":
        """Read ``folder/adapter_config.json``.

        Raises:
            ConfigError: The file is missing, is not a JSON object, has an invalid value, or is not
                that of LoRA or DoRA.
        """
        if mistaken := why_no_adapter(folder):
            raise ConfigError(f"{printable_path(folder)}: {mistaken}")
        path = folder / ADAPTER_CONFIG
        values = read_json(path)
        section = Section(str(path), values)
        if values.get("peft_type") is None:
            raise section.error("peft_type", "'LORA'", None)
        section.require("peft_type", "LORA")
        section.require("bias", "none")
        section.require("init_lora_weights", *_INITS)
        for key, value in values.items():
            # An unknown key that is null, false or empty asks for nothing beyond LoRA
            if key not in _SILENT | _READ and value:
                raise ConfigError(
                    f"{path}: {printable(key)} is not supported, only LoRA and DoRA are, got {short_repr(value)}: "
                    "merge the adapter with PEFT's merge_and_unload, and save and load that model instead"
                )
        ranks = section.section("rank_pattern")
        alphas = section.section("alpha_pattern")
        return cls(
            path,
            section.size("r", 8, _MOST_RANK),
            section.positive("lora_alpha", 8),
            section.flag("use_rslora"),
            section.flag("use_dora"),
            _patterns(ranks, lambda key: ranks.size(key, 8, _MOST_RANK)),
            _patterns(alphas, lambda key: alphas.positive(key, 8)),
            _names(section, "modules_to_save"),
        )

    def saves(self, tensor: str) -> bool:
        """Return whether the tensor called ``tensor`` is part of a module that was trained whole.

        Only the endings of the names of modules are compared, as in PEFT.
        """
        modules = accumulate(tensor.split(".")[:-1], "{}.{}".format)
        return any(module.endswith(tuple(self.saved)) for module in modules)

    def rank(self, module: str) -> int:
        """Return the rank r of the pair for ``module``."""
        return _first_fit(self.ranks, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor of B @ A: alpha / r (Hu et al., 2021), or alpha / sqrt(r).

        The second is the rank-stabilized scale (Kalajdzievski, 2023).
        """
        rank = self.rank(module)
        alpha = _first_fit(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _names(section: Section, key: str) -> list[str]:
    """Return the list of names under ``key``, or an empty list if it is absent."""
    names = section.values.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise section.error(key, "a list of names", names)
    return names


def _patterns(section: Section, read: Callable[[str], _Value]) -> list[tuple[NamePattern, _Value]]:
    """Return the keys of ``section`` as patterns, each with the value that ``read`` returns.

    Raises:
        ConfigError: There are too many keys, or a key or a value is invalid.
    """
    keys = list(section.values)
    starred = sum("*" in key or "+" in key for key in keys)
    if len(keys) > _MOST_PATTERNS or starred > _MOST_STARRED:
        raise ConfigError(
            f"{section.name}: must have at most {_MOST_PATTERNS} keys, {_MOST_STARRED} of them with * or +, "
            f"got {len(keys)} and {starred}"
        )
    return [(NamePattern(key, section.name), read(key)) for key in keys]


def _first_fit(
    patterns: Sequence[tuple[NamePattern, _Value]], module: str, default: _Value
) -> _Value:
    """Return the value of the first pattern that fits ``module``, as PEFT does, or ``default``."""
    return next((value for pattern, value in patterns if pattern.fits(module)), default)
