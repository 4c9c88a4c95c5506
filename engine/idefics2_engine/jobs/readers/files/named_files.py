"""Files that the operator names: their names in messages, and errors of reading them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.job_errors import JobError

Name = Path | str
"""A local path, or the address of a remote file."""


def is_remote(name: Name) -> bool:
    """Return whether ``name`` is an address that fsspec opens."""
    return str(name).startswith(("s3://", "gs://"))


def local_files(names: Iterable[Name]) -> tuple[Path, ...]:
    """Return those of ``names`` that are local."""
    return tuple(Path(name) for name in names if not is_remote(name))


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


@contextmanager
def reading(name: Name, where: str = "") -> Iterator[None]:
    """Convert exceptions of the system and of libraries to a ``JobError`` that names the file.

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
    except Idefics2Error:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        place = f" {where}" if where else ""
        raise JobError(
            f"{shown_name(name)}: cannot be read{place}: {reason or type(error).__name__}"
        ) from error
