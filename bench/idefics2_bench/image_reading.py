"""Time reading image files to pixels, beside transformers' Pillow backend and on more threads.

    PYTHONPATH=engine:kernels python3 bench/idefics2_bench/image_reading.py [--out FILE]

Each file is a different image of 1280 x 960 that compresses about as well as a photograph. Each
round times every contender once, so a change of the machine's speed affects all of them. ``ms`` is
the median over the rounds, per image. ``cpu_ms`` is the CPU time of this process with all its
threads. Where other programs share the cores, compare ``cpu_ms`` on one thread. The pixels of one
file are compared with transformers' bit for bit before anything is timed.

The contenders are:

- ``tiles``: uint8 tiles, which the engine normalizes later on the device.
- ``floats``: tiles that are normalized on the host to the floats that transformers returns.
- ``transformers``: one image per call, so no image is padded to the size of another.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import PIL
import transformers
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.images.loader import load_image
from idefics2_engine.images.parallel import read_all
from idefics2_engine.images.tiling import ImageConfig, Tile, make_tiles, normalize

SIZE = (1280, 960)
HALF = (0.5, 0.5, 0.5)
Files = Sequence[bytes]


def picture(seed: int) -> Image.Image:
    """Draw an image of smooth colors and a little noise, from ``seed``."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-6, 7, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str) -> bytes:
    """Return the image as a file of ``kind``, JPEG or PNG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


class Ours:
    """The engine's reader of files to tiles, or to floats."""

    def __init__(self, split: bool, threads: int, floats: bool = False) -> None:
        self.config = ImageConfig(980, 378, split, 2, 1 / 255, HALF, HALF)
        self.threads = threads
        self.floats = floats

    def tiles(self, data: bytes) -> list[Tile]:
        """Return the tiles of one file."""
        return make_tiles(load_image(data), self.config, patch_size=14, grid_side=70)

    def __call__(self, files: Files) -> None:
        """Read all files without keeping the results."""

        def read(index: int) -> None:
            tiles = self.tiles(files[index])
            if self.floats:
                for tile in tiles:
                    normalize(tile, self.config)

        read_all(read, files, self.threads)


class Processes:
    """A pool of processes that read files to tiles and share nothing, as a bound for threads."""

    def __init__(self, split: bool, count: int, files: Files) -> None:
        self.count = count
        self.pool = ProcessPoolExecutor(
            count, get_context("spawn"), initializer=_hold, initargs=(split, list(files))
        )

    def __call__(self, files: Files) -> None:
        """Read the pool's own files, each process a share of them on one thread.

        Only the number of ``files`` is used.
        """
        shares = [range(first, len(files), self.count) for first in range(self.count)]
        for _ in self.pool.map(_read_held, shares):
            pass


# In a process of the pool: its reader, and the files, which are sent only once
_HELD: list[Any] = []


def _hold(split: bool, files: list[bytes]) -> None:
    _HELD[:] = [Ours(split, 1), files]


def _read_held(share: range) -> None:
    ours, files = _HELD
    ours([files[index] for index in share])


class Theirs:
    """transformers' reader: ``load_image``, then the image processor on Pillow."""

    def __init__(self, split: bool) -> None:
        self.processor: Any = Idefics2ImageProcessorPil(do_image_splitting=split)

    def values(self, data: bytes) -> Any:
        """Return the floats of one file and the mask of its pixels."""
        image = transformers_load_image(Image.open(io.BytesIO(data)))
        return self.processor([[image]], return_tensors="np")

    def __call__(self, files: Files) -> None:
        """Read all files, one by one."""
        for data in files:
            self.values(data)


def check(data: bytes, split: bool) -> None:
    """Compare the pixels of one file with transformers', bit for bit.

    Raises:
        AssertionError: They differ.
    """
    ours, wanted = Ours(split, 1), Theirs(split).values(data)
    for tile, values in zip(ours.tiles(data), wanted["pixel_values"][0], strict=True):
        height, width, _ = tile.pixels.shape
        np.testing.assert_array_equal(normalize(tile, ours.config), values[:, :height, :width])


def measure(
    contenders: dict[str, Callable[[Files], None]], files: Files, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Time each contender in each round: (wall-clock ms, CPU ms) per image."""
    for run in contenders.values():
        # The first run imports modules and builds tables
        run(files[:8])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            clock, processor = time.perf_counter(), time.process_time()
            run(files)
            spent = time.perf_counter() - clock, time.process_time() - processor
            times[name].append((spent[0] * 1e3 / len(files), spent[1] * 1e3 / len(files)))
    return times


def rows(
    kind: str,
    split: bool,
    files: Files,
    threads: Sequence[int],
    processes: Sequence[int],
    rounds: int,
) -> list[Any]:
    """Time one kind of file, JPEG or PNG, and return a row for each contender."""
    check(files[0], split)
    contenders: dict[str, Callable[[Files], None]] = {"transformers": Theirs(split)}
    contenders["floats, 1 thread"] = Ours(split, 1, floats=True)
    contenders |= {f"tiles, {count} threads": Ours(split, count) for count in threads}
    contenders |= {
        f"tiles, {count} processes": Processes(split, count, files) for count in processes
    }
    measured = measure(contenders, files, rounds)
    times = {name: [clock for clock, _ in values] for name, values in measured.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    one = medians[f"tiles, {threads[0]} threads"]
    return [
        {
            "kernel": "images",
            "case": f"{kind.lower()}-{'split' if split else 'whole'}",
            "impl": name,
            "ms": round(medians[name], 3),
            "ms_min": round(min(values), 3),
            "ms_max": round(max(values), 3),
            "cpu_ms": round(statistics.median(cpu for _, cpu in measured[name]), 3),
            "images_per_s": round(1e3 / medians[name], 1),
            "times_transformers": round(medians["transformers"] / medians[name], 2),
            "times_first_tiles": round(one / medians[name], 2),
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Time every case; print the table, and print or write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=100, help="files of each kind (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--threads", default="1,2,4,8", help="thread counts (%(default)s)")
    parser.add_argument("--processes", default="", help="process counts, beside the threads")
    parser.add_argument("--kinds", default="JPEG,PNG", help="kinds of files (%(default)s)")
    parser.add_argument("--out", help="write the JSON here instead of printing it")
    args = parser.parse_args()
    threads = [int(count) for count in args.threads.split(",")]
    processes = [int(count) for count in args.processes.split(",") if count]
    results = []
    for kind in args.kinds.split(","):
        files = [encode(picture(seed), kind) for seed in range(args.images)]
        for split in (False, True):
            found = rows(kind, split, files, threads, processes, args.rounds)
            results += found
            for row in found:
                print(
                    f"{row['case']:12} {row['impl']:18} {row['ms']:8.2f} ms an image  "
                    f"{row['cpu_ms']:8.2f} of CPU  "
                    f"x{row['times_transformers']:<6} x{row['times_first_tiles']}",
                    file=sys.stderr,
                    flush=True,
                )
    report = json.dumps(
        {
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "usable_cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "transformers": transformers.__version__,
                "date": time.strftime("%Y-%m-%d"),
            },
            "images": args.images,
            "size": list(SIZE),
            "rounds": args.rounds,
            "rows": results,
        },
        indent=1,
    )
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(report + "\n")
    else:
        print(report)


if __name__ == "__main__":
    main()
