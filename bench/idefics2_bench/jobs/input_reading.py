"""How fast a long input is planned and checked, in a process of its own.

    python -m idefics2_bench.jobs.input_reading FOLDER ROWS

As a program it checks the first rows of the input in ``FOLDER`` as ``idefics2 run`` does.
"""

import sys
from pathlib import Path
from typing import Any

from idefics2_bench.jobs.apart import Ended, run_apart
from idefics2_bench.jobs.stand_in import MODEL, NUM_IMAGES, input_path, read_input, write_input
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.images.sources.source_check import SourceCheck
from idefics2_engine.jobs.plan.image_check import ImageCheck, image_error
from idefics2_engine.jobs.readers.validation import validate

Figures = dict[str, Any]

# Memory is compared with that of so many fewer rows
_FEWER = 10


def plan_row(folder: Path, count: int, check: ImageCheck) -> Figures:
    """Run ``idefics2 plan`` on ``count`` rows, and on a tenth of them for its memory."""
    arguments = ["plan", "-i", str(_input(folder, count)), "--device", "cpu"]
    arguments += ["--check-images", check, "--json"]
    some = run_apart("idefics2_engine", [*arguments, "--limit", str(_fewer(count))])
    return _figures("plan", count, some, run_apart("idefics2_engine", arguments))


def check_row(folder: Path, count: int) -> Figures:
    """Check ``count`` rows and that their images are there, as ``idefics2 run`` does first."""
    module = "idefics2_bench.jobs.input_reading"
    _input(folder, count)
    some, all_rows = (
        run_apart(module, [str(folder), str(limit)]) for limit in (_fewer(count), count)
    )
    return _figures("check", count, some, all_rows)


def main() -> None:
    """Check the rows that the command line names."""
    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    media = MediaConfig(allowed_media_root=folder)
    job_input = read_input(folder, limit)
    check_file = SourceCheck(media)
    found = validate(job_input, lambda row: image_error(row, ImageCheck.EXISTS, media, check_file))
    if found.num_rows != limit or found.num_bad:
        sys.exit(f"{limit} good rows must be found, got {found}")


def _input(folder: Path, count: int) -> Path:
    """Return the path of ``count`` rows, which are written unless they are there."""
    if not folder.exists():
        folder.mkdir()
        write_input(folder, count)
    return input_path(folder)


def _fewer(count: int) -> int:
    return max(1, count // _FEWER)


def _figures(impl: str, count: int, some: Ended, ended: Ended) -> Figures:
    return {
        "impl": impl,
        **MODEL,
        "rows": count,
        "image_files": min(count, NUM_IMAGES),
        "ms": 1e3 * ended.seconds,
        "rows_per_s": count / ended.seconds,
        "cpu_seconds": ended.cpu_seconds,
        "peak_MB": ended.peak_bytes / 1e6,
        "fewer_rows": _fewer(count),
        "fewer_rows_ms": 1e3 * some.seconds,
        "fewer_rows_peak_MB": some.peak_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
