"""Members of a tar archive that is read once, from its beginning to its end.

``tarfile`` takes a damaged header for the end of the archive. Here every archive has an end marker,
and everything else is damage. Sizes are checked before anything is allocated for them.
"""

import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, NamedTuple, Self, cast

from idefics2_engine.jobs.readers.files.named_files import Name, reading

# Long names and other attributes. A path has at most 4 KiB.
_MOST_HEADER_BYTES = 1 << 16
_HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_READ_AT_ONCE = 1 << 20


class Member(NamedTuple):
    """A member that is no folder.

    Attributes:
        name: Path in the archive.
        size: Bytes of its content.
        is_file: Whether it is a regular file. If not, it is a link, a pipe, a device or sparse.
        read: Returns the content of a regular file, until the next member is asked for. Raises
            ``JobError`` if the archive ends before it.
    """

    name: str
    size: int
    is_file: bool
    read: Callable[[], bytes]


def read_members(file: IO[bytes], name: Name) -> Iterator[Member]:
    """Yield the members of a tar archive, which may be packed.

    Args:
        file: The archive. It need not seek.
        name: Its name, for errors.

    Raises:
        JobError: The archive is damaged or cut, or has data behind its end. The message has the
            number of bytes before it, unpacked.
    """
    offset = 0
    with reading(name, "at byte 0"):
        archive = tarfile.open(fileobj=file, mode="r|*", tarinfo=_CheckedInfo)  # noqa: SIM115
    with archive:
        while True:
            with reading(name, f"at byte {offset}"):
                info = archive.next()
                # They would be kept until the end
                cast(Any, archive).members.clear()
            if info is None:
                break
            offset = archive.offset
            if not info.isdir():
                is_file = info.isreg() and not info.issparse()
                yield Member(info.name, info.size, is_file, partial(_read, archive, info, name))
        with reading(name, f"at byte {offset}"):
            _check_end(archive)


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo, name: Name) -> bytes:
    with reading(name, f"at byte {info.offset}"):
        content = archive.extractfile(info)
        assert content is not None
        with content:
            return content.read()


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ``ReadError`` if anything but zeros is behind the end marker."""
    assert archive.fileobj is not None
    while rest := archive.fileobj.read(_READ_AT_ONCE):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("data behind the end")


class _CheckedInfo(tarfile.TarInfo):
    """A header that is right, or raises ``ReadError``."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        is_long = info.type in _HEADER_TYPES and info.size > _MOST_HEADER_BYTES
        if info.size < 0 or is_long or info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("bad size")
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            info = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # is not in typeshed
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if info.size < 0:
            raise tarfile.ReadError("bad size")
        return info
