"""Remote files that the operator names, opened by fsspec.

Images that rows name are opened by the engine, which knows no remote storage.
"""

from typing import IO, Any, cast

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.readers.files.named_files import reading, shown_name
from idefics2_engine.jobs.store.input_files import InputFile, as_mtime

# Packages of the file systems. That in memory is for tests.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
_ETAGS = ("ETag", "etag")
_READ_AT_ONCE = 1 << 20


def open_remote(url: str) -> IO[bytes]:
    """Open a remote file for reading. It can seek.

    Raises:
        JobError: There is no such file.
        ConfigError: fsspec or the package of its storage is not installed.
    """
    with reading(url):
        system, path = _system(url)
        return cast(IO[bytes], system.open(path, "rb", block_size=_READ_AT_ONCE))


def identify_remote(url: str) -> InputFile:
    """Return the identity of a remote file for the job's folder.

    ``mtime_ns`` is a number that differs when the file's ETag does, or its time of change where
    the storage has no ETags.

    Raises:
        JobError: As in ``open_remote``.
    """
    with reading(url):
        system, path = _system(url)
        # Listings are cached, and a job may begin long after one
        system.invalidate_cache()
        info = system.info(path)
        version = next((str(info[key]) for key in _ETAGS if info.get(key)), None)
        if version is None:
            version = str(system.modified(path))
        number = as_mtime(version.encode())
        return InputFile(shown_name(url), int(info["size"]), number)


def expand_remote(url: str) -> list[str]:
    """Return the files that a URL names, in name order: itself, a folder's, or those of a glob.

    Raises:
        ConfigError: There are none, or as in ``open_remote``.
        JobError: The storage cannot be read.
    """
    with reading(url):
        system, path = _system(url)
        if any(one in path for one in "*?["):
            found = [one for one in system.glob(path) if system.isfile(one)]
        elif system.isdir(path):
            found = [one["name"] for one in system.ls(path, detail=True) if one["type"] == "file"]
        else:
            found = [path] if system.exists(path) else []
        if not found:
            raise ConfigError(f"{shown_name(url)}: must be a file, a folder or a pattern of files")
        scheme = url.partition("://")[0]
        return [f"{scheme}://{one.lstrip('/')}" for one in sorted(found)]


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    if scheme not in _PACKAGES or "://" not in url:
        raise ConfigError(f"{shown_name(url)}: must be s3://… or gs://…")
    # fsspec would open the file of another storage behind it
    if "::" in url:
        raise ConfigError(f"{shown_name(url)}: must not have '::'")
    fsspec = import_extra("fsspec", "remote")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES[scheme]
        raise ConfigError(
            f"{package} is needed for {scheme}:// and not installed: pip install {package}"
        ) from error
    return system, path
