"""Paths: the names of implementations that can be compared."""

import pathlib
from dataclasses import dataclass, replace

from idefics2_engine.errors import ConfigError, short_repr

DESCRIPTION = "recording.json"
"""The file by which a folder is known as a recording."""

_DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_IMPLEMENTATIONS = {
    "ours": ("triton", "reference", "deterministic"),
    "transformers": ("sdpa", "eager"),
    "float64": (),
}
_WANTED = (
    "ours[:triton|:reference|:deterministic][:dtype][:nf4], transformers[:sdpa|:eager][:dtype], "
    "float64, or the folder of a recording"
)


@dataclass(frozen=True)
class Path:
    """One way to compute answers.

    Attributes:
        kind: ``ours``, ``transformers``, ``float64`` or ``recording``.
        implementation: Of the operations of ``ours``, or of the attention of ``transformers``. If
            ``None``, the default of the device, or transformers' own.
        dtype: Name of the dtype of weights and activations. For ``float64``, the dtype that the
            weights are rounded to first. If ``None``, the default of the device.
        nf4: Whether linear layers are quantized to NF4 while they are loaded.
        folder: Folder of a recording.
    """

    kind: str
    implementation: str | None = None
    dtype: str | None = None
    nf4: bool = False
    folder: pathlib.Path | None = None

    @classmethod
    def parse(cls, text: "str | Path") -> "Path":
        """Return the path that ``text`` names, such as ``ours:triton:bf16``.

        Raises:
            ConfigError: The text names no path, or a part of it is unknown or given twice.
        """
        if isinstance(text, Path):
            return text
        kind, *parts = text.split(":")
        if kind not in _IMPLEMENTATIONS:
            folder = pathlib.Path(text).expanduser()
            if (folder / DESCRIPTION).is_file():
                return cls("recording", folder=folder)
            raise ConfigError(f"a path must be {_WANTED}, got {short_repr(text)}")
        path = cls(kind)
        for part in parts:
            name = _SHORT.get(part, part)
            if name in _IMPLEMENTATIONS[kind] and path.implementation is None:
                path = replace(path, implementation=name)
            elif name in _DTYPES and path.dtype is None and kind != "float64":
                path = replace(path, dtype=name)
            elif name == "nf4" and kind == "ours" and not path.nf4:
                path = replace(path, nf4=True)
            else:
                raise ConfigError(
                    f"a path must be {_WANTED}, got {short_repr(part)} in {short_repr(text)}"
                )
        return path

    def __str__(self) -> str:
        """Return the text that ``parse`` reads."""
        if self.folder is not None:
            return str(self.folder)
        nf4 = "nf4" if self.nf4 else None
        dtype = None if self.kind == "float64" else self.dtype
        return ":".join(part for part in (self.kind, self.implementation, dtype, nf4) if part)
