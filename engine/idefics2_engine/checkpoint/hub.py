"""Resolution of the name of a model or adapter to a folder, with downloads from the hub.

Only this module uses ``huggingface_hub``. It imports it only if a name is not a folder. The hub's
settings apply (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, …).
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idefics2_engine.checkpoint.shards import ADAPTER_WEIGHTS, join_names, weight_paths
from idefics2_engine.errors import ConfigError, Idefics2Error, install_extras
from idefics2_engine.images.settings import image_settings
from idefics2_engine.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    printable_path,
    why_no_adapter,
    why_no_model,
)

_logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class _Kind:
    """A kind of folder, model or adapter, and the files that it needs.

    Attributes:
        name: The kind, in messages.
        patterns: Patterns of the files to download.
        check: Raises ``Idefics2Error`` if a folder lacks a file.
        mistaken: Returns a message if a folder is of the other kind, else an empty string.
    """

    name: str
    patterns: tuple[str, ...]
    check: Callable[[Path], None]
    mistaken: Callable[[Path], str]


def find_model(model: str | Path, revision: str | None = None) -> Path:
    """Return the folder of the checkpoint ``model``, downloaded if necessary.

    A cached model is used without contacting the hub. An existing folder is not checked for
    completeness.

    Args:
        model: A folder, or a hub id: ``org/name`` or ``org/name@revision``.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ConfigError: ``model`` is neither a folder nor a hub id, is an adapter, or cannot be
            downloaded. Or ``revision`` is given for a folder, is malformed or contradicts the
            one in ``model``. Or a JSON file of the repository is missing or malformed.
        CheckpointError: The repository lacks weights in safetensors, or their index is malformed.
    """
    return _find(_MODEL, model, revision)


def find_model_config(model: str | Path, revision: str | None = None) -> Path:
    """Return a folder that has all of the checkpoint ``model`` but its weights.

    The arguments and errors are those of ``find_model``. Weights are neither downloaded nor missed.
    """
    return _find(_MODEL_CONFIG, model, revision)


def find_adapter(adapter: str | Path) -> Path:
    """Return the folder of a LoRA adapter, downloaded if necessary.

    ``adapter`` is a folder or a hub id, as in ``find_model``.

    Raises:
        ConfigError: ``adapter`` is neither a folder nor a hub id, is a model, or cannot be
            downloaded. Or the repository lacks a file.
    """
    return _find(_ADAPTER, adapter, None)


def is_hub_id(text: str) -> bool:
    """Return whether ``text`` has the form of a hub id, with or without a revision."""
    name, at, revision = text.partition("@")
    return bool(_HUB_ID.fullmatch(name)) and (not at or _is_revision(revision))


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text and text[0] not in "/-"


def _find(kind: _Kind, name: str | Path, revision: str | None) -> Path:
    # pathlib raises in expanduser for an unknown ~user, and in is_dir for a long name
    folder = Path(os.path.expanduser(name))
    if str(name) and os.path.isdir(folder):
        if revision is not None:
            raise ConfigError(
                f"revision is for models on the hub, got {revision!r:.80} for the folder {str(folder)!r}"
            )
        if mistaken := kind.mistaken(folder):
            raise ConfigError(f"{printable_path(folder)}: {mistaken}")
        return folder
    if not isinstance(name, str) or not is_hub_id(name):
        raise ConfigError(
            f"{kind.name} must be a folder or a hub id such as org/name or org/name@revision, "
            f"got {str(name)!r:.200}"
        )
    repo, _, after = name.partition("@")
    if revision is not None and not (isinstance(revision, str) and _is_revision(revision)):
        raise ConfigError(f"revision must be a branch, a tag or a commit, got {revision!r:.80}")
    if after and revision not in (None, after):
        raise ConfigError(
            f"revision must be the one that {kind.name} names, {after!r}, got {revision!r}"
        )
    return _from_hub(kind, repo, revision or after or None)


def _from_hub(kind: _Kind, repo: str, revision: str | None) -> Path:
    """Return the snapshot of ``repo`` in the hub's cache, downloaded if it is not complete."""
    named = f"{repo}@{revision}" if revision else repo
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise ConfigError(
            f"{kind.name} {named}: there is no such folder, and for the hub huggingface_hub is missing: "
            + install_extras("hub")
        ) from None

    def snapshot(**options: Any) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(kind.patterns),
                ignore_patterns=["*/*"],
                **options,
            )
        )

    found, mistaken = "is not in the cache, or not whole", ""
    try:
        folder = snapshot(local_files_only=True)
        mistaken = kind.mistaken(folder)
        kind.check(folder)
        return folder
    # The repository is not in the cache, or a file of its snapshot is missing
    except FileNotFoundError:
        pass
    except Idefics2Error as error:
        found = f"is not whole in the cache: {error}"
    except Exception as error:
        raise _explained(kind, named, error) from error
    if constants.HF_HUB_OFFLINE and mistaken:
        raise ConfigError(f"{kind.name} {named}: {mistaken}")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{kind.name} {named} {found}; HF_HUB_OFFLINE forbids to download it")
    _logger.info("%s %s %s: asking the hub", kind.name, named, found)
    try:
        folder = snapshot()
    # The hub's network library raises many classes of errors
    except Exception as error:
        raise _explained(kind, named, error) from error
    if mistaken := kind.mistaken(folder):
        raise ConfigError(f"{kind.name} {named}: {mistaken}")
    try:
        kind.check(folder)
    except Idefics2Error as error:
        raise type(error)(
            f"{kind.name} {named}: its repository is not whole: {error} (pickled weights are not downloaded)"
        ) from None
    return folder


def _explained(kind: _Kind, named: str, error: Exception) -> ConfigError:
    """Return an error that says what a user can do about the hub's ``error``."""
    from huggingface_hub import errors

    # For a cache miss, the response may be that of the error's cause
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        why = (
            "access to it must be granted: accept its terms on its page on the hub, "
            "and set HF_TOKEN to a token that may read it"
        )
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        why = "the hub has no such repository, or it is private and HF_TOKEN does not give access to it"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "its repository has no such revision"
    elif isinstance(error, errors.LocalEntryNotFoundError) and status is None:
        why = "it is not in the cache, and the hub cannot be reached"
    elif status is not None:
        why = f"the hub answers with status {status}"
    else:
        first_line = str(error).partition("\n")[0]
        why = f"it cannot be had from the hub: {type(error).__name__}: {first_line:.300}"
    return ConfigError(f"{kind.name} {named}: {why}")


def _check_model(folder: Path) -> None:
    """Raise unless ``folder`` has every file that a checkpoint needs."""
    _check_model_config(folder)
    weight_paths(folder)


def _check_model_config(folder: Path) -> None:
    """Raise unless ``folder`` has every file that a checkpoint needs beside the weights."""
    _check_files(folder, CONFIG, "tokenizer.json", "tokenizer_config.json")
    image_settings(folder)


def _check_adapter(folder: Path) -> None:
    _check_files(folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def _check_files(folder: Path, *names: str) -> None:
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        raise ConfigError(f"{printable_path(folder)}: lacks {join_names(missing, 9)}")


_MODEL = _Kind("model", ("*.json", "*.jinja", "*.safetensors"), _check_model, why_no_model)
_MODEL_CONFIG = _Kind("model", ("*.json", "*.jinja"), _check_model_config, why_no_model)
# The config.json is fetched only to recognize a model that was named as an adapter.
_ADAPTER = _Kind(
    "adapter", (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG), _check_adapter, why_no_adapter
)
