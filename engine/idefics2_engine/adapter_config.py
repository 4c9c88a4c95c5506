"""What ``adapter_config.json`` says about a LoRA adapter in PEFT's format: ranks and scales, and that it is of the plain kind."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from idefics2_engine.errors import ConfigError
from idefics2_engine.json_file import Section, printable, read_json
from idefics2_engine.model_files import ADAPTER_CONFIG, shown_path, why_no_adapter
from idefics2_engine.shown import shown

_Value = TypeVar("_Value")

_MOST_RANK = 1 << 16
_MOST_PATTERNS = 10_000
# How training began, as far as the base weights stayed what they are
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Keys without a say in the sum: what was trained is what the file holds, and what was dropped out is back
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
        "modules_to_save",
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
    rank_stabilised: bool
    ranks: Mapping[re.Pattern[str], int]  # by pattern of a module's name, the first that fits
    alphas: Mapping[re.Pattern[str], float]

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig":
        """Read ``folder/adapter_config.json``.

        Raises:
            ConfigError: It is missing, no JSON, or describes something else than plain LoRA.
        """
        if mistaken := why_no_adapter(folder):
            raise ConfigError(f"{shown_path(folder)}: {mistaken}")
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
                    f"{path}: {printable(key)} is not supported, only plain LoRA is, got {shown(value)}"
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
        )

    def rank(self, module: str) -> int:
        """Return r of ``module``."""
        return _first_fit(self.ranks, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor of ``B @ A``: alpha / r, or alpha / sqrt(r) where rank-stabilised."""
        rank = self.rank(module)
        alpha = _first_fit(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _patterns(section: Section, read: Callable[[str], _Value]) -> dict[re.Pattern[str], _Value]:
    """Compile the keys of ``section``, which PEFT takes for regular expressions of the end of a module's name.

    Matching tries every way to share a name among quantifiers and alternatives, which may take for ever: so few of the former
    and none of the latter.
    """
    keys = list(section.values)
    if len(keys) > _MOST_PATTERNS or sum("*" in key or "+" in key for key in keys) > 64:
        raise ConfigError(
            f"{section.name}: must have at most {_MOST_PATTERNS} keys, 64 of them with * or +, got {len(keys)}"
        )
    compiled = {}
    for key in keys:
        simple = re.fullmatch(r"[\w.^$*+\\-]{1,200}", key, re.ASCII)
        if not simple or key.count("*") + key.count("+") > 2:
            raise ConfigError(
                f"{section.name}: keys must be names of modules, with * or + at most twice, got {shown(key)}"
            )
        try:
            pattern = re.compile(rf"(.*\.)?({key})$")
        except re.error:
            raise ConfigError(
                f"{section.name}: keys must be regular expressions, got {shown(key)}"
            ) from None
        compiled[pattern] = read(key)
    return compiled


def _first_fit(patterns: Mapping[re.Pattern[str], _Value], module: str, default: _Value) -> _Value:
    """Return the value of the first pattern that fits ``module``, as PEFT does."""
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)
