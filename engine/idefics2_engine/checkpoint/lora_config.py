"""The ``adapter_config.json`` of a plain LoRA adapter in PEFT's format."""

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
# Some times the modules of the 8B model, each of which is matched with all patterns
_MOST_PATTERNS = 4096
_MOST_STARRED = 64
# How training began, as far as the base weights stayed what they are
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Keys without a say in the sum: what was trained is what the file holds, and what was dropped out
# is back
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
        "use_rslora",
    ]
)


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says about ranks and scales."""

    path: Path
    r: int
    alpha: float
    rank_stabilized: bool
    ranks: Sequence[tuple[NamePattern, int]]  # by pattern of a module's name, the first that fits
    alphas: Sequence[tuple[NamePattern, float]]
    saved: Sequence[str]  # ends of the names of modules that were trained whole

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig":
        """Read ``folder/adapter_config.json``.

        Raises:
            ConfigError: It is missing, no JSON, or describes something else than plain LoRA.
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
            # as null, false and {} they mean the plain kind
            if key not in _SILENT | _READ and value:
                raise ConfigError(
                    f"{path}: {printable(key)} is not supported, only plain LoRA is, got {short_repr(value)}: "
                    "merge the adapter with PEFT's merge_and_unload, and save and load that model instead"
                )
        ranks = section.section("rank_pattern")
        alphas = section.section("alpha_pattern")
        return cls(
            path,
            section.size("r", 8, _MOST_RANK),
            section.positive("lora_alpha", 8),
            section.flag("use_rslora"),
            _patterns(ranks, lambda key: ranks.size(key, 8, _MOST_RANK)),
            _patterns(alphas, lambda key: alphas.positive(key, 8)),
            _names(section, "modules_to_save"),
        )

    def saves(self, tensor: str) -> bool:
        """Tell whether the model's ``tensor`` is part of a module that was trained whole."""
        modules = accumulate(tensor.split(".")[:-1], "{}.{}".format)
        return any(module.endswith(tuple(self.saved)) for module in modules)

    def rank(self, module: str) -> int:
        """Return r of ``module``."""
        return _first_fit(self.ranks, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor of ``B @ A``: alpha / r, or alpha / sqrt(r) if rank-stabilized."""
        rank = self.rank(module)
        alpha = _first_fit(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _names(section: Section, key: str) -> list[str]:
    """Return the list of names under ``key``, empty for none."""
    names = section.values.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise section.error(key, "a list of names", names)
    return names


def _patterns(section: Section, read: Callable[[str], _Value]) -> list[tuple[NamePattern, _Value]]:
    """Compile the keys of ``section``, to PEFT expressions of the end of a module's name."""
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
    """Return the value of the first pattern that fits ``module``, as PEFT does."""
    return next((value for pattern, value in patterns if pattern.fits(module)), default)
