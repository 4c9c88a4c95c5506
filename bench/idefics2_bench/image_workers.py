"""What reading an image file costs the engine's process: in threads, and in worker processes.

    PYTHONPATH=engine:kernels:bench python3 bench/idefics2_bench/image_workers.py [--out FILE]

JPEG files of two sizes are read while another thread runs a plain Python loop, as the engine's
thread does between its launches. ``loop_lost_ms`` is how much longer that loop takes for each
image. ``engine_cpu_ms`` is the engine's process on the processor without the loop, and
``workers_cpu_ms`` the worker processes. Tiles are compared with those of a thread before anything
is timed. Rounds are interleaved and medians reported.
"""

import argparse
import io
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import TileRules
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.images.parallel import read_all
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.reader import ImageReader
from idefics2_engine.images.tiling import ImageConfig
from idefics2_engine.images.workers.worker_pool import WorkerPool

SIZES = ((640, 480), (980, 735))
_HALF = (0.5, 0.5, 0.5)
_RULES = TileRules(
    ImagePolicy.PARITY, 1 << 25, ImageConfig(980, 378, False, 2, 1 / 255, _HALF, _HALF), 14, 70
)
_TURNS = 1000


def jpeg(width: int, height: int, seed: int) -> bytes:
    """Return smooth colors with a little noise, which compress about as photographs do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-6, 7, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass
class Loop:
    """A Python loop on a thread of its own."""

    turns: int = 0
    is_over: bool = False

    def run(self) -> None:
        """Count until the loop is over."""
        while not self.is_over:
            for _ in range(_TURNS):
                pass
            self.turns += _TURNS


def beside_loop(work: Callable[[], object]) -> tuple[float, float, int]:
    """Run ``work`` beside a loop.

    Returns:
        The seconds, the CPU seconds of this process without the loop's, and the loop's turns.
    """
    loop = Loop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert thread.ident is not None
    of_loop = time.pthread_getcpuclockid(thread.ident)

    def now() -> tuple[float, float, int]:
        cpu = time.process_time() - time.clock_gettime(of_loop)
        return time.perf_counter(), cpu, loop.turns

    begin = now()
    work()
    end = now()
    loop.is_over = True
    thread.join()
    return end[0] - begin[0], end[1] - begin[1], end[2] - begin[2]


def workers_cpu(pids: Sequence[int]) -> float:
    """Return the CPU seconds that processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(files: Sequence[bytes], pool: WorkerPool, threads: int) -> dict[str, dict[str, float]]:
    """Return what one image costs in threads and in workers, in milliseconds."""
    alone, _, turns = beside_loop(lambda: time.sleep(0.5))
    turns_per_s = turns / alone
    costs = {}
    for name, workers in (("threads", None), ("workers", pool)):
        reader = ImageReader(MediaConfig(), _RULES, FileCache(0), workers)

        def read(index: int, reader: ImageReader = reader, workers: Any = workers) -> None:
            reader.tiles(files[index], in_worker=workers is not None)

        before = workers_cpu(pool.pids)
        every = partial(read_all, read, files, threads + 1)
        seconds, used, turns = beside_loop(every)
        elsewhere = workers_cpu(pool.pids) - before
        share = 1e3 / len(files)
        costs[name] = {
            "ms": seconds * share,
            "loop_lost_ms": (seconds - turns / turns_per_s) * share,
            "engine_cpu_ms": used * share,
            "workers_cpu_ms": elsewhere * share,
        }
    return costs


def main() -> None:
    """Measure both sizes and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=100, help="files of each size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--count", type=int, default=1, help="threads and workers (%(default)s)")
    parser.add_argument("--out", help="write the JSON here instead of printing it")
    args = parser.parse_args()
    begin = time.perf_counter()
    pool = WorkerPool(args.count, _RULES.max_tile_bytes + 64, pool_bytes=1 << 27)
    pool.start()
    pool.wait()
    started = time.perf_counter() - begin
    rows = []
    for width, height in SIZES:
        files = [jpeg(width, height, seed) for seed in range(args.images)]
        threads = ImageReader(MediaConfig(), _RULES, FileCache(0)).tiles(files[0])
        workers = pool.tiles(files[0], "a file", _RULES)
        assert workers is not None
        assert [tile.fingerprint for tile in threads] == [t.fingerprint for t in workers.tiles]
        rounds = [measure(files, pool, args.count) for _ in range(args.rounds)]
        for impl in ("threads", "workers"):
            costs = {
                key: round(statistics.median(one[impl][key] for one in rounds), 3)
                for key in rounds[0][impl]
            }
            rows.append(
                {"kernel": "images", "case": f"jpeg-{width}x{height}", "impl": impl, **costs}
            )
            print(rows[-1], flush=True)
    pool.close()
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    report = {"machine": machine, "workers_started_s": round(started, 2), "count": args.count}
    report |= {"images": args.images, "rounds": args.rounds, "rows": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    else:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
