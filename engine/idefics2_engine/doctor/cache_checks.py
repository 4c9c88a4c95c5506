"""Checks of folders: the hub's cache and what it has, Triton's cache, and free disk."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from idefics2_engine.checkpoint.shards import weight_paths
from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.machine import Machine
from idefics2_engine.doctor.model_memory import IDEFICS2_8B, download_bytes
from idefics2_engine.errors import Idefics2Error, install_extras
from idefics2_engine.model_files import CONFIG, read_text

HUB_MODEL = "HuggingFaceM4/idefics2-8b"
_PREFIX = "models--"
# A cache of more models is not searched to its end
_MOST_MODELS = 1000


@dataclass(frozen=True)
class CachedModel:
    """A snapshot of an Idefics2 checkpoint in the hub's cache.

    Attributes:
        name: Its hub id.
        folder: The snapshot.
        lack: What is missing or malformed, empty if it is whole.
    """

    name: str
    folder: Path
    lack: str


def cache_checks(machine: Machine) -> Iterator[Check]:
    """Yield the checks of caches."""
    yield hub_check(machine)
    yield triton_cache_check(machine)


def hub_folder(machine: Machine) -> Path:
    """Return the folder of the hub's cache, by the rules of ``huggingface_hub``."""
    environ = machine.environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return _expanded(machine, environ[name])
    if environ.get("HF_HOME"):
        return _expanded(machine, environ["HF_HOME"]) / "hub"
    cache = environ.get("XDG_CACHE_HOME")
    return (_expanded(machine, cache) if cache else machine.home / ".cache") / "huggingface" / "hub"


def triton_folder(machine: Machine) -> Path:
    """Return the folder of compiled kernels, by Triton's rules."""
    if machine.environ.get("TRITON_CACHE_DIR"):
        return Path(machine.environ["TRITON_CACHE_DIR"])
    home = machine.environ.get("TRITON_HOME")
    return (Path(home) if home else machine.home) / ".triton" / "cache"


def cached_models(folder: Path) -> list[CachedModel]:
    """Return the Idefics2 checkpoints in the hub's cache ``folder``."""
    models = []
    for storage in _names(folder)[:_MOST_MODELS]:
        if not storage.startswith(_PREFIX):
            continue
        snapshots = folder / storage / "snapshots"
        for commit in _names(snapshots):
            snapshot = snapshots / commit
            if _is_idefics2(snapshot):
                name = storage.removeprefix(_PREFIX).replace("--", "/")
                models.append(CachedModel(name, snapshot, _lack(snapshot)))
    return models


def hub_check(machine: Machine) -> Check:
    """Check the hub's cache: where it is, whether Idefics2 is in it, and the disk below it."""
    name, folder = "hub cache", hub_folder(machine)
    models, free = cached_models(folder), _free_bytes(folder)
    whole = sorted({model.name for model in models if not model.lack})
    broken = [model for model in models if model.lack and model.name not in whole]
    details = {
        "folder": str(folder),
        "free_bytes": free,
        "models": whole,
        "incomplete": sorted({model.name for model in broken}),
    }
    where = f"{folder}, {_gb(free)} free"
    is_offline = machine.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    patterns = " ".join(f"--include '*.{end}'" for end in ("json", "jinja", "safetensors"))
    fetch = f"hf download {HUB_MODEL} {patterns}"
    if is_offline:
        fetch = f"HF_HUB_OFFLINE=0 {fetch}"
    if machine.package("huggingface_hub") is None:
        fetch = f"{install_extras('hub')}, then {fetch}"
    if broken:
        one = broken[0]
        found = f"{where}; {one.name} is not whole: {one.lack}"
        return Check(name, Status.WARNING, found, fetch.replace(HUB_MODEL, one.name), details)
    if whole:
        return Check(name, Status.OK, f"{where}; has {', '.join(whole)}", details=details)
    need = download_bytes(IDEFICS2_8B)
    found = f"{where}; no Idefics2 in it"
    if not _is_writable(folder):
        found = f"{found}, and it cannot be written"
        return Check(name, Status.WARNING, found, "set HF_HOME to a folder of your own", details)
    if free is not None and free < need:
        found = f"{found}, and {HUB_MODEL} has {_gb(need)}"
        return Check(
            name, Status.WARNING, found, "set HF_HOME to a folder on a larger disk", details
        )
    return Check(name, Status.OK, f"{found}; {HUB_MODEL} has {_gb(need)}", fetch, details)


def triton_cache_check(machine: Machine) -> Check:
    """Check that compiled kernels can be kept."""
    name, folder = "triton cache", triton_folder(machine)
    free, entries = _free_bytes(folder), len(_names(folder))
    details = {"folder": str(folder), "free_bytes": free, "entries": entries}
    found = f"{folder}, {_gb(free)} free, {entries} entries"
    if not _is_writable(folder):
        fix = "set TRITON_CACHE_DIR to a folder of your own"
        return Check(name, Status.PROBLEM, f"{found}; it cannot be written", fix, details)
    if free is not None and free < facts.TRITON_CACHE_BYTES:
        fix = "free some disk, or set TRITON_CACHE_DIR to a folder on a larger disk"
        return Check(name, Status.WARNING, f"{found}; too little", fix, details)
    return Check(name, Status.OK, found, details=details)


def find_cached(machine: Machine, model: str) -> Path | None:
    """Return the snapshot of the hub id ``model`` in the cache; ``None`` if it is not there."""
    found = [one for one in cached_models(hub_folder(machine)) if one.name == model]
    return found[0].folder if found else None


def _expanded(machine: Machine, text: str) -> Path:
    text = Template(text).safe_substitute(machine.environ)
    if text == "~" or text.startswith("~/"):
        return machine.home / text[2:]
    return Path(text)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _is_idefics2(snapshot: Path) -> bool:
    if not os.path.exists(snapshot / CONFIG):
        return False
    try:
        config = json.loads(read_text(snapshot / CONFIG))
    except (Idefics2Error, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "idefics2"


def _lack(snapshot: Path) -> str:
    try:
        weight_paths(snapshot)
    except Idefics2Error as error:
        return str(error).removeprefix(f"{snapshot}: ")
    return ""


def _existing(folder: Path) -> Path:
    """Return the folder or the nearest one around it that exists."""
    return next((one for one in (folder, *folder.parents) if os.path.isdir(one)), Path("/"))


def _is_writable(folder: Path) -> bool:
    return os.access(_existing(folder), os.W_OK | os.X_OK)


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None


def _gb(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 1e9:.1f} GB"
