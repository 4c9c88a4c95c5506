"""GPUs and their driver, from ``nvidia-smi`` or ``/proc/driver/nvidia``."""

import re
from dataclasses import dataclass
from typing import Any

from idefics2_engine.doctor.machine import Machine, ProgramError

_FIELDS = ("index", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
_VERSION = re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Name of its model.
        capability: Ten times its compute capability; ``None`` if it is not known.
        total: Bytes of memory; ``None`` if they are not known.
        free: Bytes that no process uses; ``None`` if they are not known.
    """

    name: str
    capability: int | None = None
    total: int | None = None
    free: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the GPU for JSON."""
        return {
            "name": self.name,
            "capability": self.capability,
            "total_bytes": self.total,
            "free_bytes": self.free,
        }


@dataclass(frozen=True)
class Gpus:
    """What is known of all GPUs.

    Attributes:
        gpus: The GPUs, in order.
        driver: Version of the driver, ``None`` without one.
        source: Where this is from: ``nvidia-smi``, ``/proc/driver/nvidia`` or nothing.
        trouble: Why ``nvidia-smi`` did not answer, empty if it did or is absent.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    source: str = ""
    trouble: str = ""


def query_gpus(machine: Machine) -> Gpus:
    """Return the GPUs of the machine."""
    trouble = ""
    try:
        printed = machine.run(
            "nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"
        )
    except ProgramError as error:
        trouble, printed = str(error), None
    rows = [row for row in map(_row, (printed or "").splitlines()) if row is not None]
    if rows:
        return Gpus(tuple(gpu for gpu, _ in rows), rows[0][1], "nvidia-smi")
    if printed is not None:
        trouble = "printed no GPU"
    return _from_proc(machine, trouble)


def _row(line: str) -> tuple[Gpu, str] | None:
    """Parse a line of ``nvidia-smi``; ``None`` if it is none."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_FIELDS) or not parts[0].isdecimal():
        return None
    _, name, capability, total, free, driver = parts
    tenfold = re.fullmatch(r"(\d+)\.(\d)", capability)
    return (
        Gpu(name, int(tenfold[1] + tenfold[2]) if tenfold else None, _mebi(total), _mebi(free)),
        driver,
    )


def _mebi(text: str) -> int | None:
    # MIG and unified memory give "[N/A]"
    return int(text) << 20 if text.isdecimal() else None


def _from_proc(machine: Machine, trouble: str) -> Gpus:
    text = machine.read("proc/driver/nvidia/version")
    if text is None:
        return Gpus(trouble=trouble)
    version = _VERSION.search(text)
    folder = machine.root / "proc/driver/nvidia/gpus"
    names = []
    try:
        found = sorted(path.name for path in folder.iterdir())
    except OSError:
        found = []
    for name in found:
        text = machine.read(f"proc/driver/nvidia/gpus/{name}/information") or ""
        model = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        names.append(model[1].strip() if model else "unknown GPU")
    driver = version[1] if version else None
    return Gpus(tuple(map(Gpu, names)), driver, "/proc/driver/nvidia", trouble)
