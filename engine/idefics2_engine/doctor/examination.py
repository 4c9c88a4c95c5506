"""All checks of a machine, in the order of the report."""

import os
from collections.abc import Iterator
from pathlib import Path

from idefics2_engine.doctor.cache_checks import HUB_MODEL, cache_checks, find_cached
from idefics2_engine.doctor.check import Check
from idefics2_engine.doctor.deep import deep_checks
from idefics2_engine.doctor.gpu_checks import gpu_checks
from idefics2_engine.doctor.gpu_query import query_gpus
from idefics2_engine.doctor.host_checks import host_checks
from idefics2_engine.doctor.machine import Machine
from idefics2_engine.doctor.memory_checks import memory_checks
from idefics2_engine.doctor.model_memory import IDEFICS2_8B
from idefics2_engine.doctor.optional_packages import optional_packages_check
from idefics2_engine.doctor.version_checks import version_checks
from idefics2_engine.errors import ConfigError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model_files import printable_path


def examine(machine: Machine, model: str | None = None, *, deep: bool = False) -> Iterator[Check]:
    """Yield the checks as they are made.

    Args:
        machine: The machine.
        model: The model that memory is compared with: a folder, or a hub id that is in the cache.
            If ``None``, the shape of idefics2-8b.
        deep: Whether to start a process that imports torch and runs a kernel.

    Raises:
        ConfigError: ``model`` is neither, or its ``config.json`` is malformed.
    """
    name, config = model_config(machine, model)
    return _checks(machine, name, config, deep=deep)


def model_config(machine: Machine, model: str | None) -> tuple[str, ModelConfig]:
    """Return the name and the config of ``model``, as ``examine`` describes; it raises the same."""
    if model is None:
        return HUB_MODEL.partition("/")[2], IDEFICS2_8B
    folder = Path(os.path.expanduser(model))
    if not (model and os.path.isdir(folder)):
        cached = find_cached(machine, model)
        if cached is None:
            raise ConfigError(
                f"model must be a folder or a hub id that is in the cache, got {model!r:.200}"
            )
        return model, ModelConfig.load(cached)
    return printable_path(folder), ModelConfig.load(folder)


def _checks(machine: Machine, name: str, config: ModelConfig, *, deep: bool) -> Iterator[Check]:
    found = query_gpus(machine)
    has_gpu = bool(found.gpus)
    yield from version_checks(machine, has_gpu=has_gpu)
    yield from gpu_checks(machine, found)
    yield from memory_checks(machine, config, name, found.gpus)
    yield from cache_checks(machine)
    yield from host_checks(machine, has_gpu=has_gpu)
    yield optional_packages_check(machine)
    if deep:
        yield from deep_checks(machine)
