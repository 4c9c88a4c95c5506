"""Reading and complete checking of the header of a safetensors file, without its values.

A file consists of the header's length in eight bytes, the header, and the tensors' bytes without
gaps. The header is a JSON object that maps a name to dtype, shape and range of bytes. The
safetensors library checks most of this. But it accepts a repeated name, and its error for a Git LFS
pointer or a web page is "header too large".
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from idefics2_engine.errors import CheckpointError, ConfigError, short_repr
from idefics2_engine.json_file import parse_json
from idefics2_engine.model_files import open_file, printable_path

_LENGTH_BYTES = 8
# 32 MiB is far above the 8B model, whose seven headers have 0.1 MiB in all
_MOST_HEADER_BYTES = 1 << 25
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that dense weights may be stored in, as safetensors spells them."""


@dataclass(frozen=True)
class StoredTensor:
    """The description of a tensor in a file, without its values.

    Attributes:
        file: The safetensors file.
        name: Name that the engine uses.
        dtype: Dtype as safetensors spells it.
        shape: Shape of the tensor.
        key: Name in the file, which depends on the release that wrote it.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    key: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the values in the file."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    def check(self, shape: tuple[int, ...], *dtypes: str) -> None:
        """Raise ``CheckpointError`` unless the tensor has this shape and one of ``dtypes``."""
        if self.shape != shape:
            raise CheckpointError(
                f"{printable_path(self.file)}: tensor {self.key!r} must have shape {shape}, got {self.shape}"
            )
        if self.dtype not in dtypes:
            raise CheckpointError(
                f"{printable_path(self.file)}: tensor {self.key!r} must be {', '.join(dtypes)}, got {self.dtype}"
            )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the descriptions of the tensors in ``file`` by name.

    Raises:
        CheckpointError: The file is missing, unreadable, not in safetensors' format or cut short,
            or its header contradicts itself or the file's length.
    """
    with open_file(file, CheckpointError) as (opened, size):
        header = _header_bytes(file, opened, size)
    if header.lstrip()[:1] != b"{":
        raise CheckpointError(f"{printable_path(file)}: header must be a JSON object")
    try:
        parsed = parse_json(header, file)
    except ConfigError as error:
        raise CheckpointError(f"{error} (in the header)") from None
    _check_metadata(file, parsed.pop("__metadata__", None))
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in parsed.items():
        tensors[name], start, end = _tensor(file, name, entry)
        ranges.append((start, end, name))
    _check_ranges(file, ranges, size - _LENGTH_BYTES - len(header))
    return tensors


def _header_bytes(file: Path, opened: BinaryIO, size: int) -> bytes:
    """Read the header of ``opened``, a file of ``size`` bytes."""
    start = opened.read(512)
    # Before a JSON object, any eight bytes may be a length, even those of another format
    if start[_LENGTH_BYTES:][:1] != b"{":
        _check_foreign(file, start)
    if size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{printable_path(file)}: must begin with {_LENGTH_BYTES} bytes for the header's length, got {size} bytes"
        )
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if length > _MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{printable_path(file)}: is no safetensors file: header must have at most {_MOST_HEADER_BYTES} bytes, "
            f"got {length}"
        )
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(
            f"{printable_path(file)}: is cut short: header has {length} bytes, the file {size - _LENGTH_BYTES} after its length"
        )
    opened.seek(_LENGTH_BYTES)
    return opened.read(length)


def _check_foreign(file: Path, start: bytes) -> None:
    """Raise ``CheckpointError`` if the file is empty, a Git LFS pointer, a web page or a pickle.

    ``start`` has at most the first 512 bytes.
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise CheckpointError(f"{printable_path(file)}: is empty")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{printable_path(file)}: is a Git LFS pointer, not the weights: run `git lfs pull` in its repository, "
            "or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{printable_path(file)}: is a web page, not the weights: the download was answered with a page, "
            "as for an error or a log-in"
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise CheckpointError(
            f"{printable_path(file)}: is a pickle under another name; only safetensors are read, as a pickle can run code"
        )


def _check_metadata(file: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{printable_path(file)}: __metadata__ must map names to strings, got {short_repr(metadata)}"
        )


def _tensor(file: Path, name: str, entry: object) -> tuple[StoredTensor, int, int]:
    """Check the header's ``entry`` for ``name``; return the tensor, its first byte and its end.

    The range is relative to the end of the header.
    """
    where = f"{printable_path(file)}: tensor {name!r:.200}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where} must have dtype, shape and data_offsets, got {short_repr(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has an unknown dtype: {short_repr(dtype)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape must be sizes, got {short_repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets must be where it begins and ends, got {short_repr(offsets)}"
        )
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where}: {dtype} of shape {short_repr(tuple(shape))} is {bits / 8:.15g} bytes, "
            f"got {offsets[1] - offsets[0]}"
        )
    return StoredTensor(file, name, dtype, tuple(shape), name), offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    """Return whether ``value`` is a list of at most 16 integers from 0 to 2**63 - 1."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _check_ranges(file: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """Check that ``ranges`` fill the ``size`` bytes after the header without gaps or overlaps.

    A range is the first byte, the end and the name of a tensor.
    """
    filled = 0
    for start, end, name in sorted(ranges):
        if start != filled:
            what = (
                "begins inside another"
                if start < filled
                else f"leaves {start - filled} bytes before it unused"
            )
            raise CheckpointError(f"{printable_path(file)}: tensor {name!r:.200} {what}")
        filled = end
    if filled > size:
        raise CheckpointError(
            f"{printable_path(file)}: is cut short: its tensors have {filled} bytes, of which {size} are there"
        )
    if filled < size:
        raise CheckpointError(
            f"{printable_path(file)}: has {size - filled} bytes after its last tensor"
        )
