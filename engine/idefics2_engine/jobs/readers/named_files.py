"""Files that the operator names: their names in messages, and how they are opened."""

import importlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.readers.unpacked_files import is_remote

Name = Path | str
"""A local path, or the address of a remote file."""


def local_files(names: Iterable[Name]) -> tuple[Path, ...]:
    """Return those of ``names`` that are local."""
    return tuple(Path(name) for name in names if not is_remote(str(name)))


def base_name(name: Name) -> str:
    """Return the last part of ``name``, for the places of rows."""
    return printable(str(name).rstrip("/").rpartition("/")[2])


def shown_name(name: Name) -> str:
    """Return ``name`` for messages to the operator, without credentials."""
    scheme, separator, rest = str(name).partition("://")
    if not separator:
        return printable(str(name))
    host, slash, path = rest.partition("/")
    return printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def printable(text: str) -> str:
    """Return ``text`` if it is printable, else its ``repr``."""
    return text if text.isprintable() else repr(text)


def optional_module(name: str, extra: str) -> Any:
    """Import a module of an extra.

    Raises:
        JobError: It is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise JobError(
            f"{package} is needed for this input and not installed: "
            f"pip install 'idefics2-engine[{extra}]'"
        ) from error


@contextmanager
def reading(name: Name, where: str = "") -> Iterator[None]:
    """Convert every exception inside to a ``JobError`` that names the file.

    Libraries raise many classes, some with addresses in their messages. The message has the
    class, and the exception is chained.

    Args:
        name: The file.
        where: How far it was read, such as ``at row 12``.

    Raises:
        JobError: The code inside raised an exception.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        place = f" {where}" if where else ""
        raise JobError(
            f"{shown_name(name)}: cannot be read{place}: {reason or type(error).__name__}"
        ) from error


def check_regular(name: Name) -> None:
    """Raise ``JobError`` if ``name`` is a local path and not a regular file.

    A job reads its input several times, and a pipe would wait for its writer.
    """
    if is_remote(str(name)):
        return
    with reading(name):
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise JobError(
                f"{shown_name(name)}: must be a file that can be read twice, "
                "got a folder, a pipe or a device"
            )


def open_input(name: Name) -> IO[bytes]:
    """Open a regular or a remote file for reading, with its bytes as they are. It can seek.

    Raises:
        JobError: There is no such file, or it is not regular.
    """
    check_regular(name)
    if is_remote(str(name)):
        from idefics2_engine.jobs.readers.remote_files import open_remote

        return open_remote(str(name))
    with reading(name):
        return open(name, "rb")
