"""What the parent of many workers costs: a job with stand-ins for the models of all of them."""

import resource
import time
from pathlib import Path
from typing import Any

from idefics2_bench.jobs.stand_in import MODEL, read_input, write_input
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.row_encoding import OutputEncoding
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.worker_pool import WorkerPool
from idefics2_engine.jobs.writers.output_file import JsonlFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions

Figures = dict[str, Any]

NUM_WORKERS = 16
"""Worker processes."""

RATE = 5000.0
"""Rows a second of all workers together."""

_ENGINE = "idefics2_bench.jobs.stand_in:StandInEngine"
# Answers that a worker of a GPU generates at once
_SEQUENCES = 256


def parent_cost(folder: Path, count: int, workers: int = NUM_WORKERS) -> Figures:
    """Answer ``count`` rows with ``workers`` processes, at ``RATE`` and at full speed.

    Returns:
        The row at ``RATE``. ``parent_cpu_us_per_row`` is the CPU time of this process, which reads
        the rows, sends them, and writes journal and output.
    """
    folder.mkdir(exist_ok=True)
    write_input(folder, count)
    figures = _job(folder, count, workers, RATE)
    fast = _job(folder, count, workers, None)
    return {
        "impl": "parent",
        **MODEL,
        "rows": count,
        "workers": workers,
        **figures,
        "full_speed_rows_per_s": fast["rows_per_s"],
        "full_speed_parent_cpu_us_per_row": fast["parent_cpu_us_per_row"],
    }


def _job(folder: Path, count: int, workers: int, rate: float | None) -> Figures:
    spec = EngineSpec({"rate": rate and rate / workers, "max_num_seqs": _SEQUENCES}, _ENGINE)
    with WorkerPool(spec, workers, threads=1) as pool:
        # The processes start with the first row
        list(pool.iterate(row.to_engine() for row in read_input(folder, workers).rows()))
        runner = JobRunner(
            folder / ("paced.jsonl" if rate else "fast.jsonl"),
            read_input(folder),
            lambda: pool,
            OutputEncoding(SaveOptions(), JsonlFormat, folder),
            JobDescription({}),
            JobOptions(in_flight=2 * _SEQUENCES * workers),
        )
        cpu, begin = _own_cpu_seconds(), time.perf_counter()
        result = runner.run()
        seconds, cpu = time.perf_counter() - begin, _own_cpu_seconds() - cpu
    if result.exit_code != 0 or result.counts.rows != count:
        raise RuntimeError(f"all {count} rows must be answered, got {result}")
    return {
        "ms": 1e3 * seconds,
        "rows_per_s": count / seconds,
        "parent_cpu_us_per_row": 1e6 * cpu / count,
        "parent_cpu_share": cpu / seconds,
    }


def _own_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
