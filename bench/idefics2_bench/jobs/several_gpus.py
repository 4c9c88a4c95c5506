"""``idefics2 run`` and Ray Data with one GPU and with several, on the same rows.

    python -m idefics2_bench.jobs.several_gpus --random-weights tests/data/idefics2-8b --json out.json

Cases, where N is a number of rows and W of workers, each with a GPU of its own:

- ``workers-N-xW``: the command ``idefics2 run --workers W``
- ``killed-N-xW``: the same, and one worker is killed when half of the rows are answered
- ``ray-N-xW``: ``build_processor`` with ``concurrency=W``, on a local cluster

The rows are those of ``run-N`` of ``idefics2 bench jobs``. Loading the model is not counted: time
begins with the first row of ``idefics2 run``, and for Ray Data when the last actor has its model.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from idefics2_bench import machine, model_suite
from idefics2_bench.jobs.apart import start_apart
from idefics2_bench.jobs.memory import children
from idefics2_bench.jobs.rows_on_disk import RowsOnDisk, write_rows
from idefics2_bench.offline import Results
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor

Figures = dict[str, Any]

_POLL_SECONDS = 0.05
_BATCH_ROWS = 64
# Small enough that all actors have rows until the end
_ROWS_OF_BLOCK = 10


def run_workers(
    model: str, rows: RowsOnDisk, out: Path, workers: int, options: Sequence[str], *, kill: bool
) -> Figures:
    """Answer ``rows`` with ``idefics2 run``; kill a worker in the middle if asked to.

    Returns:
        ``ms`` from the first worker's first row to the last answer, and what each worker did:
        ``rows_of_worker``, and ``longest_gap_s``, the longest time between two of its answers.
        ``has_killed`` is false if the job was over before a worker could be killed.

    Raises:
        Idefics2Error: A row has no answer, or the command fails.
    """
    arguments = ["run", "-i", str(rows.folder / "rows.jsonl"), "-o", str(out), "--stats"]
    arguments += ["--model", model, "--workers", str(workers), *options]
    stats = Path(f"{out}.stats.jsonl")
    with open(f"{out}.log", "w+", encoding="utf-8") as log:
        process = start_apart("idefics2_engine", arguments, stdout=log, stderr=log)
        try:
            has_killed = kill and _kill_in_the_middle(process, stats, rows.count)
            process.wait()
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            raise Idefics2Error(
                f"idefics2 run ended with {process.returncode}: {log.read()[-999:]}"
            )
    lines = _objects(out)
    if [line["row"] for line in lines] != list(range(rows.count)):
        raise Idefics2Error(f"each of {rows.count} rows must be there once, got {len(lines)}")
    run = json.loads(Path(f"{out}.summary.json").read_text(encoding="utf-8"))["run"]
    answered = _objects(stats)
    begin = min(one["time"] - one["seconds"] for one in answered)
    times: dict[int, list[float]] = {}
    for one in answered:
        times.setdefault(one["worker"] or 0, []).append(one["time"])
    return {
        **({"has_killed": has_killed} if kill else {}),
        "new_tokens": run["tokens"]["completion"],
        "ms": 1e3 * (max(one["time"] for one in answered) - begin),
        "rows_of_worker": {worker: len(some) for worker, some in sorted(times.items())},
        "longest_gap_s": {worker: _longest_gap(some) for worker, some in sorted(times.items())},
    }


def run_ray(model: str, rows: RowsOnDisk, workers: int, kwargs: dict[str, Any]) -> Figures:
    """Answer ``rows`` through Ray Data with ``workers`` actors.

    Raises:
        Idefics2Error: A row has no answer.
    """
    import ray

    from idefics2_engine.jobs.ray_data import Idefics2ProcessorConfig, build_processor

    items = _objects(rows.folder / "rows.jsonl")
    config = Idefics2ProcessorConfig(
        model_source=model,
        engine_kwargs=kwargs,
        concurrency=workers,
        batch_size=_BATCH_ROWS,
        build=_Build(rows.folder),
    )
    on_gpu = kwargs.get("device") != "cpu"
    ray.init(
        num_cpus=max(4, os.cpu_count() or 1),
        num_gpus=workers if on_gpu else 0,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        process = build_processor(
            config,
            preprocess=_Preprocess(rows.folder),
            postprocess=lambda row: {
                "tokens": row["num_generated_tokens"],
                "error": row["__inference_error__"],
            },
        )
        blocks = max(1, rows.count // _ROWS_OF_BLOCK)
        dataset = ray.data.from_items(items, override_num_blocks=blocks)
        answered = process(dataset).materialize()
        end = time.time()
        answers = answered.take_all()
    finally:
        ray.shutdown()
    if len(answers) != rows.count or any(one["error"] for one in answers):
        raise Idefics2Error(f"{rows.count} rows must be answered, got {len(answers)}")
    begin = max(float(path.read_text()) for path in rows.folder.glob("built-*"))
    return {"new_tokens": sum(one["tokens"] for one in answers), "ms": 1e3 * (end - begin)}


class _Preprocess:
    """Makes a row of Ray Data from a line, with its images as bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image", "image": (self._folder / name).read_bytes()} for name in row["images"]
        ]
        content.append({"type": "text", "text": row["prompt"]})
        params = {**row["sampling"], "temperature": 0.0}
        messages = [{"role": "user", "content": content}]
        return {"id": row["id"], "messages": messages, "sampling_params": params}


class _Build:
    """Builds an engine and writes when that was done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from idefics2_engine import LLM

        llm = LLM(*args, **kwargs)
        (self._folder / f"built-{os.getpid()}").write_text(repr(time.time()))
        return llm


def _kill_in_the_middle(process: "subprocess.Popen[str]", stats: Path, count: int) -> bool:
    """Kill a worker when half of the rows have statistics; return whether there still was one."""
    while process.poll() is None:
        if stats.exists() and stats.read_bytes().count(b"\n") >= count // 2:
            workers = _workers_of(process.pid)
            if workers:
                os.kill(workers[0], signal.SIGKILL)
            return bool(workers)
        time.sleep(_POLL_SECONDS)
    return False


def _workers_of(process: int) -> list[int]:
    """Return the worker processes of a running ``idefics2 run``."""
    return [
        child
        for child in children(process)
        if b"worker_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def _objects(path: Path) -> list[dict[str, Any]]:
    # Answers of random weights have all kinds of line separators
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def _longest_gap(times: Sequence[float]) -> float:
    ordered = sorted(times)
    return max((late - soon for soon, late in itertools.pairwise(ordered)), default=0.0)


def _checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of the model, which is written if its weights are random."""
    source = model_suite.folder(options)
    if options.random_weights is None:
        return source
    llm = model_suite.load(options, kv_cache_tokens=8192, max_model_len=4096, enforce_eager=True)
    save_checkpoint(llm.model, folder / "model", config_from=source)
    llm.close()
    return folder / "model"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases, print and write their figures, and return 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    if options.rows < 2 or min(options.workers) < 1:
        parser.error("--rows must be at least 2, and --workers at least 1")
    about = model_suite.about(options)
    about.setdefault("loop_seconds", round(machine.loop_seconds(), 3))
    results = Results(options.json, about)
    with TemporaryDirectory(prefix="idefics2-gpus-", dir=options.folder) as name:
        folder = Path(name)
        model = _checkpoint(options, folder)
        processor = Processor.load(model, ModelConfig.load(model), split=False)
        rows = write_rows(folder / "rows", processor, options.rows, options.shrink)
        settings = ["--no-split", "--device", options.device]
        named = "idefics2-8b (random weights)" if options.random_weights else str(model)

        def measure(kind: str, workers: int) -> Figures:
            if kind == "ray":
                kwargs = {"split_images": False, "device": options.device}
                return run_ray(str(model), rows, workers, kwargs)
            out = folder / f"{kind}-{workers}.jsonl"
            return run_workers(str(model), rows, out, workers, settings, kill=kind == "killed")

        for kind in options.kind or ("workers", "killed", "ray"):
            for workers in options.workers:
                # With one worker, nobody goes on while it starts again
                if kind == "killed" and workers == 1:
                    continue
                figures = measure(kind, workers)
                rate = 1e3 * rows.count / figures["ms"]
                results.add(
                    {
                        "kernel": "jobs",
                        "case": f"{kind}-{rows.count}-x{workers}",
                        "impl": "ray" if kind == "ray" else "run",
                        "model": named,
                        "dtype": options.dtype,
                        "requests": rows.count,
                        "workers": workers,
                        **figures,
                        "requests_per_s": rate,
                    }
                )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("jobs", __doc__, has_peer=False)
    parser.prog = "python -m idefics2_bench.jobs.several_gpus"
    add = parser.add_argument
    add("--rows", type=int, default=2000, metavar="N", help="rows (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[1, 2], metavar="W", help="(default: 1 2)")
    add("--kind", action="append", choices=("workers", "killed", "ray"), help="only these cases")
    add("--shrink", type=int, default=1, metavar="N", help="divide text and new tokens by N")
    add("--folder", type=Path, metavar="DIR", help="where the model, rows and jobs are written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
