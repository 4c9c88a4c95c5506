"""Safe access to the files of a model's or an adapter's folder.

Folders are untrusted: a name may be, or link to, a pipe or a device, which never ends. After links
are followed, only regular files up to a size limit for their kind are read.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from idefics2_engine.errors import ConfigError, Idefics2Error

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_MOST_BYTES = {
    # The largest known JSON file, a tokenizer, has 4 MiB
    ".json": 1 << 26,
    # The source of a chat template has at most 64 KiB
    ".jinja": 1 << 20,
    # The largest file of the 8B model has 5 GB
    ".safetensors": 1 << 40,
}
# Other files have checksums
_MOST_OTHER_BYTES = 1 << 24
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def open_file(
    path: Path, error: type[Idefics2Error] = ConfigError
) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open the regular file ``path`` as a context manager that yields it and its size in bytes.

    Raises:
        Idefics2Error: The file is missing, not a regular file or too large, or a read fails, also
            inside the ``with`` statement. The class is ``error``.
    """
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    except IsADirectoryError:
        raise error(f"{printable_path(path)}: must be a file, got a folder") from None
    # A name that UTF-8 cannot encode is a ValueError
    except (OSError, ValueError) as reason:
        raise error(f"{printable_path(path)}: cannot be read: {_why(reason)}") from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
            raise error(f"{printable_path(path)}: must be a file, got {kind}")
        most = _MOST_BYTES.get(path.suffix, _MOST_OTHER_BYTES)
        if status.st_size > most:
            raise error(
                f"{printable_path(path)}: must have at most {most} bytes, got {status.st_size}"
            )
        try:
            yield file, status.st_size
        except OSError as reason:
            raise error(f"{printable_path(path)}: cannot be read: {_why(reason)}") from None


def read_file(path: Path, error: type[Idefics2Error] = ConfigError) -> bytes:
    """Return the content of the regular file ``path``.

    Raises as ``open_file`` does.
    """
    with open_file(path, error) as (file, size):
        return file.read(size)


def read_text(path: Path, error: type[Idefics2Error] = ConfigError) -> str:
    """Return the text of the regular file ``path``, with universal newlines.

    Raises as ``open_file`` does.
    """
    content = read_file(path, error)
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except UnicodeDecodeError as reason:
        raise error(
            f"{printable_path(path)}: cannot be read as text: byte {reason.start} is not UTF-8"
        ) from None


def paths_in(folder: Path, *patterns: str, error: type[Idefics2Error] = ConfigError) -> list[Path]:
    """Return the sorted paths in ``folder`` that match a pattern; raise ``error`` on failure."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError) as reason:
        raise error(f"{printable_path(folder)}: cannot be listed: {_why(reason)}") from None
    return [folder / name for name in sorted(names) if any(fnmatchcase(name, p) for p in patterns)]


def is_there(path: Path) -> bool:
    """Return whether ``path`` exists; a broken link counts as existing."""
    return os.path.lexists(path)


def why_no_model(folder: Path) -> str:
    """Return the message for an adapter's ``folder`` given as a model's, or an empty string."""
    if is_there(folder / CONFIG) or not is_there(folder / ADAPTER_CONFIG):
        return ""
    return (
        "is an adapter, not a model: name it with --adapter (adapter=...), "
        "and with --model the model that it was trained on"
    )


def why_no_adapter(folder: Path) -> str:
    """Return the message for a model's ``folder`` given as an adapter's, or an empty string."""
    if is_there(folder / ADAPTER_CONFIG) or not is_there(folder / CONFIG):
        return ""
    return "is a model, not an adapter: name it with --model"


def printable_path(path: Path) -> str:
    """Return ``path`` as text if it is printable, else its ``repr``."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a pipe's writer or acquiring a controlling terminal."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _why(reason: Exception) -> str:
    """Return a short reason why a file cannot be opened or read."""
    return reason.strerror or "" if isinstance(reason, OSError) else "no file can have this name"
