"""The memory of a process and its children, as Linux counts it. Elsewhere it is 0.

``ru_maxrss`` does not serve, because a process begins with its parent's.
"""

from pathlib import Path


def resident_bytes(process: int | str = "self") -> int:
    """Return the bytes that a process has in memory."""
    return _status(process, "VmRSS:")


def peak_bytes(process: int | str = "self") -> int:
    """Return the most bytes that a process had in memory; 0 after its end."""
    return _status(process, "VmHWM:")


def family_peak_bytes(process: int) -> int:
    """Return the sum of ``peak_bytes`` of a process and of all that it started."""
    return peak_bytes(process) + sum(map(family_peak_bytes, children(process)))


def children(process: int) -> list[int]:
    """Return the ids of the processes that a process has started and that have not ended."""
    started: list[str] = []
    for of_thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            started += of_thread.read_text(encoding="utf-8").split()
        except OSError:
            # The thread has ended
            continue
    return sorted(map(int, started))


def _status(process: int | str, name: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    # In units of 1024 bytes
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
