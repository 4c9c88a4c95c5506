"""Opening of the files that the operator names: regular local ones, and remote ones by fsspec.

Only the operator names remote files. Images that rows name are opened by the engine, which knows no
remote storage.
"""

import gzip
import hashlib
import importlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.input_files import InputFile

Name = Path | str
"""A local path, or the URL of a remote file."""

# The in-memory file system is that of tests
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
_ETAGS = ("ETag", "etag")
_READ_AT_ONCE = 1 << 20


def is_remote(name: Name) -> bool:
    """Return whether ``name`` is the URL of a remote file: ``s3://…`` or ``gs://…``."""
    return isinstance(name, str) and name.partition("://")[0] in _PACKAGES and "://" in name


def local_files(names: Iterable[Name]) -> tuple[Path, ...]:
    """Return those of ``names`` that are local."""
    return tuple(Path(name) for name in names if not is_remote(name))


def base_name(name: Name) -> str:
    """Return the last part of ``name``, for the places of rows."""
    return printable(str(name).rstrip("/").rpartition("/")[2])


def shown_name(name: Name) -> str:
    """Return ``name`` for messages to the operator, without credentials."""
    scheme, separator, rest = str(name).partition("://")
    if not separator or not is_remote(name):
        return printable(str(name))
    host, slash, path = rest.partition("/")
    return printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def optional_module(name: str, extra: str) -> Any:
    """Import a module of an extra.

    Raises:
        JobError: It is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
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
        where: How far it was read, such as ``after row 12``.

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


def open_input(name: Name) -> BinaryIO:
    """Open a local or a remote file for reading, with its bytes as they are. It can seek.

    Raises:
        JobError: There is no such file, or it is a folder, a pipe or a device. A job reads its
            input several times.
    """
    if isinstance(name, str) and is_remote(name):
        return open_remote(name)
    with reading(name):
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise JobError(
                f"{shown_name(name)}: must be a file that can be read twice, "
                "got a folder, a pipe or a device"
            )
        return open(fd, "rb")


@contextmanager
def open_unpacked(name: Name) -> Iterator[BinaryIO]:
    """Open a file as a context manager; ``.gz`` and ``.zst`` are unpacked while it is read.

    Raises:
        JobError: As in ``open_input``.
    """
    suffix = base_name(name).rpartition(".")[2].lower()
    if suffix == "gz":
        with open_input(name) as file, gzip.GzipFile(fileobj=file) as unpacked:
            yield cast(BinaryIO, unpacked)
    elif suffix == "zst":
        unpacker = optional_module("zstandard", "parquet").ZstdDecompressor()
        with open_input(name) as file, unpacker.stream_reader(file, read_across_frames=True) as raw:
            yield raw
    else:
        with open_input(name) as file:
            yield file


def open_remote(url: str) -> BinaryIO:
    """Open a remote file for reading. It can seek.

    Raises:
        JobError: There is no such file, or fsspec or the package of its storage is not installed.
    """
    with reading(url):
        system, path = _system(url)
        return cast(BinaryIO, system.open(path, "rb", block_size=_READ_AT_ONCE))


def identify_remote(url: str) -> InputFile:
    """Return the identity of a remote file for the job's folder.

    ``mtime_ns`` is a number that differs when the file's ETag does, or its time of change where
    the storage has no ETags.

    Raises:
        JobError: As in ``open_remote``.
    """
    with reading(url):
        system, path = _system(url)
        info = system.info(path)
        version = next((str(info[key]) for key in _ETAGS if info.get(key)), None)
        if version is None:
            version = str(system.modified(path))
        digest = hashlib.sha256(version.encode()).digest()
        # A signed integer of 64 bits, as a local file's
        number = int.from_bytes(digest[:8], "little") >> 1
        return InputFile(shown_name(url), int(info["size"]), number)


def expand_remote(url: str) -> list[str]:
    """Return the files that a URL names, in name order: itself, a folder's, or those of a glob.

    Raises:
        JobError: There are none, or as in ``open_remote``.
    """
    with reading(url):
        system, path = _system(url)
        if any(one in path for one in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            found = [one["name"] for one in system.ls(path) if one["type"] == "file"]
        else:
            found = [path] if system.exists(path) else []
        if not found:
            raise JobError(f"{shown_name(url)}: must be a file, a folder or a pattern of files")
        scheme = url.partition("://")[0]
        return [f"{scheme}://{one.lstrip('/')}" for one in sorted(found)]


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    fsspec = optional_module("fsspec", "remote")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        package = _PACKAGES[scheme]
        raise JobError(
            f"{package} is needed for {scheme}:// and not installed: pip install {package}"
        ) from error
    return system, path


def printable(text: str) -> str:
    """Return ``text`` if it is printable, else its ``repr``."""
    return text if text.isprintable() else repr(text)
