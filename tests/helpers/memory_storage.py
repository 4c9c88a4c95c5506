"""Remote storage in memory, under the names of real ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


@contextmanager
def storage_in_memory(scheme: str) -> Iterator[Any]:
    """Replace fsspec's file system of ``scheme`` by an empty one in memory."""

    class Storage(MemoryFileSystem):  # type: ignore[misc]
        protocol = (scheme,)
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(MemoryFileSystem._strip_protocol(path.removeprefix(f"{scheme}://")))

    before = _registry.get(scheme)
    fsspec.register_implementation(scheme, Storage, clobber=True)
    try:
        yield Storage()
    finally:
        del _registry[scheme]
        if before is not None:
            _registry[scheme] = before
