"""Description of the machine, its measured bandwidth and matmul rate, and the speed of Python."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch

from idefics2_bench.timing import alternate, measure

# Larger copies are slower in CUDA graphs
_COPY_BYTES = 1 << 28
_COPIES = 4
_MATMUL_SIZE = 8192
_CPU_COPY_BYTES = 1 << 26
_CPU_MATMUL_SIZE = 768
_CPU_ROUNDS = 5
_LOOP_TURNS = 10**7


def describe(device: str = "cuda") -> dict[str, object]:
    """Return GPU, versions, commit, date, and measured bandwidth (TB/s) and bf16 rate (TFLOP/s).

    ``loop_seconds`` is the time of a fixed loop in Python, on which the host's part of a job depends.
    If ``device`` is a CPU, ``gpu`` is ``None``, the CPU's name, cores and threads are returned, and
    nothing is measured.
    """
    versions: dict[str, object] = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if torch.device(device).type == "cpu":
        return {"gpu": None, "cpu": _cpu(), "threads": torch.get_num_threads(), **versions}
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **versions,
        "copy_TBps": round(copy_bandwidth(), 3),
        "matmul_TFLOPs": round(matmul_rate(), 1),
        "loop_seconds": round(loop_seconds(), 3),
    }


def loop_seconds() -> float:
    """Return the seconds of a loop of 10 million turns in Python, the median of three."""
    times = []
    for _ in range(3):
        begin = perf_counter()
        _ = [None for _ in range(_LOOP_TURNS)]
        times.append(perf_counter() - begin)
    return sorted(times)[1]


def copy_bandwidth() -> float:
    """Return the bandwidth of a copy on the device in TB/s, with bytes read and written."""
    size = (_COPIES, _COPY_BYTES)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_(256)
    target = torch.empty_like(source)
    pairs = list(zip(target, source, strict=True))
    time = measure({"copy": [partial(a.copy_, b) for a, b in pairs]})["copy"]
    return 2 * _COPY_BYTES / time.ms / 1e9


def matmul_rate() -> float:
    """Return the rate of a large bf16 product of random matrices in TFLOP/s."""
    size = (_MATMUL_SIZE, _MATMUL_SIZE)
    a, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    time = measure({"matmul": [lambda: a @ b]})["matmul"]
    return 2 * _MATMUL_SIZE**3 / time.ms / 1e9


def cpu_ceilings() -> dict[str, object]:
    """Return the bandwidth of a copy (TB/s) and the rate of an fp32 product (TFLOP/s) on the CPU."""
    source = torch.ones(_CPU_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    a, b = (torch.randn(_CPU_MATMUL_SIZE, _CPU_MATMUL_SIZE) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    times = alternate(calls, _CPU_ROUNDS, 1, source.device)
    return {
        "copy_TBps": round(2 * _CPU_COPY_BYTES / times["copy"].ms / 1e9, 5),
        "matmul_TFLOPs": round(2 * _CPU_MATMUL_SIZE**3 / times["matmul"].ms / 1e9, 4),
    }


def _cpu() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def _commit() -> str:
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    # Without changes the output of ``git status`` is empty, for which ``_output`` returns "unknown"
    return commit if changed == "unknown" else f"{commit}-changed"
