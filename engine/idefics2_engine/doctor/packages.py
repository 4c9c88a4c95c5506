"""Installed packages and their versions, read from metadata without importing anything."""

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_RELEASE = re.compile(r"\d+(\.\d+)*")
_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", re.MULTILINE)
_HIP = re.compile(r"^(?:hip|rocm)\b[^=\n]*=\s*['\"]", re.MULTILINE)
_LOCAL_CUDA = re.compile(r"\+cu(\d+)(\d)$")


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        name: Name as it was looked for.
        version: Version with its local part, such as ``2.11.0+cu130``.
        folder: The folder that its modules are in.
        requires: Its requirements, as in its metadata.
    """

    name: str
    version: str
    folder: Path
    requires: tuple[str, ...] = ()

    def pin_of(self, other: str) -> str | None:
        """Return the version of ``other`` that this package requires exactly, if it does."""
        for requirement in self.requires:
            found = re.match(rf"{re.escape(other)}\s*\(?==\s*([\w.+]+)", requirement)
            if found:
                return found[1]
        return None


def find_package(name: str) -> Package | None:
    """Return the installed package ``name``, ``None`` if there is none."""
    try:
        found = metadata.distribution(name)
        version = found.version
    # Broken metadata has no version, which is a KeyError or None
    except (metadata.PackageNotFoundError, KeyError):
        return None
    if not version:
        return None
    return Package(name, version, Path(str(found.locate_file(""))), tuple(found.requires or ()))


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: ``2.11.0a0+git`` is (2, 11, 0)."""
    found = _RELEASE.match(version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def is_older(version: str, least: str) -> bool:
    """Return whether ``version`` is below ``least``, by the numbers that ``least`` has."""
    wanted = release(least)
    return (*release(version), *(0,) * len(wanted))[: len(wanted)] < wanted


def torch_cuda(torch: Package) -> str | None:
    """Return the CUDA version that torch was built with, such as ``13.0``; ``None`` for a CPU.

    It is in ``torch/version.py``, which is read as text, or in the version.
    """
    try:
        text = (torch.folder / "torch" / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = _LOCAL_CUDA.search(torch.version)
        return f"{found[1]}.{found[2]}" if found else None
    built = _CUDA.search(text)
    return built[1] if built else None


def is_for_amd(torch: Package) -> bool:
    """Return whether torch was built for ROCm."""
    try:
        text = (torch.folder / "torch" / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "+rocm" in torch.version
    return bool(_HIP.search(text))
