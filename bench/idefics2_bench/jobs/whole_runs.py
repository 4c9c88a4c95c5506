"""Whole jobs on a model: the runner of ``idefics2 run`` beside ``LLM.iterate`` on the same rows."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from idefics2_bench import model_suite
from idefics2_bench.compilations import counted_compilations
from idefics2_bench.jobs.counted_files import CountedFiles
from idefics2_bench.jobs.rows_on_disk import RowsOnDisk, write_rows
from idefics2_bench.offline_workloads import offline_requests
from idefics2_bench.time_report import time_figures
from idefics2_bench.timing import synchronize
from idefics2_engine import LLM, Row, SamplingParams, llm_options
from idefics2_engine.images.sources.source_check import SourceCheck
from idefics2_engine.jobs.fingerprint_parts import sampling_parts
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import JobResult
from idefics2_engine.jobs.plan.image_check import ImageCheck, image_error
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.validation import validate
from idefics2_engine.jobs.row_encoding import OutputEncoding
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.writers.output_file import JsonlFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.outputs import RequestOutput

Figures = dict[str, Any]

ITERATE = "iterate"
"""The name of ``LLM.iterate`` in rows."""

ONE_THREAD_OPTION = "--image-threads"
# With so many images the worker processes start, which takes no time of a long job
_WARM_UP_REQUESTS = 64
_WARM_UP_SHRINK = 32
_WARM_UP_SEED = 1


class WholeRuns:
    """Jobs of random requests on one model, whose weights are loaded once.

    Every job gets an ``LLM`` of its own, so that no cache has its images and prompts.

    Args:
        options: Those of the suite.
        folder: Where rows and jobs are written.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._model: Idefics2 | None = None
        self._rows: dict[int, RowsOnDisk] = {}
        self._settings: dict[str, str] = {}
        self._num_jobs = 0

    def beside_iterate(self, count: int) -> list[Figures]:
        """Answer ``count`` rows through the runner and through ``LLM.iterate``, in rounds.

        Returns:
            The rows of both, those of the rounds with the median time.
        """
        runs, iterations = [], []
        for turn in range(self._options.rounds):
            # The order changes, so that a machine that gets slower slows both
            for is_run in (False, True) if turn % 2 == 0 else (True, False):
                with self._ready_llm(count) as llm:
                    if is_run:
                        runs.append(self._run(llm, count))
                    else:
                        iterations.append(self._iterate(llm, count))
        run, iteration = _median(runs), _median(iterations)
        run |= {
            "peer": ITERATE,
            "peer_ms": iteration["ms"],
            "speedup": iteration["ms"] / run["ms"],
        }
        return [self._row(self._options.ops, run), self._row(ITERATE, iteration)]

    def one_thread(self, count: int) -> list[Figures]:
        """Answer ``count`` rows through the runner, with one thread and no process for images."""
        runs = []
        for _ in range(self._options.rounds):
            # With processes, which are the default on a GPU, one thread would not be alone
            with self._ready_llm(count, image_threads=1, image_workers=0) as llm:
                runs.append(self._run(llm, count))
        run = _median(runs)
        run["says_starved"] = run["advice"] is not None
        run["names_option"] = ONE_THREAD_OPTION in (run["advice"] or "")
        return [self._row(self._options.ops, run)]

    def _row(self, impl: str, figures: Figures) -> Figures:
        return {"impl": impl, **self._settings, **figures}

    def _ready_llm(self, count: int, **arguments: Any) -> LLM:
        """Return an ``LLM`` without the rows in its caches that has answered other requests."""
        options = self._options
        with patch("idefics2_engine.llm.load_model", self._load):
            llm = model_suite.load(
                options,
                max_num_seqs=options.max_num_seqs,
                kv_cache_tokens=options.kv_cache_tokens,
                allowed_media_root=self._folder,
                **arguments,
            )
        self._settings = model_suite.settings_of(llm, options)
        shrink = max(options.shrink, _WARM_UP_SHRINK)
        requests = offline_requests(
            "mixed", llm.processor, min(_WARM_UP_REQUESTS, count), _WARM_UP_SEED, shrink
        )
        prompts = [
            (request.prompt(), SamplingParams(temperature=0.0, max_tokens=request.max_tokens))
            for request in requests
        ]
        for output in llm.iterate(prompts):
            _raise_error(output)
        return llm

    def _load(self, *arguments: Any) -> Idefics2:
        if self._model is None:
            self._model = llm_options.load_model(*arguments)
        return self._model

    def _rows_of(self, llm: LLM, count: int) -> RowsOnDisk:
        if count not in self._rows:
            folder = self._folder / f"rows-{count}"
            self._rows[count] = write_rows(folder, llm.processor, count, self._options.shrink)
        return self._rows[count]

    def _iterate(self, llm: LLM, count: int) -> Figures:
        """Answer the rows as a user's own loop does."""
        rows = self._rows_of(llm, count)
        prompts: list[Row] = [row.to_engine() for row in rows.input().rows()]
        prompt_tokens = new_tokens = 0
        with _watched(llm, rows) as figures:
            for output in llm.iterate(prompts):
                _raise_error(output)
                prompt_tokens += len(output.prompt_token_ids)
                new_tokens += len(output.outputs[0].token_ids)
        _check_tokens(new_tokens, rows)
        return {**figures, "prompt_tokens": prompt_tokens}

    def _run(self, llm: LLM, count: int) -> Figures:
        """Answer the rows as ``idefics2 run`` does once the model is loaded."""
        rows = self._rows_of(llm, count)
        job_input = rows.input()
        begin = time.perf_counter()
        check_input(job_input, llm)
        check_seconds = time.perf_counter() - begin
        self._num_jobs += 1
        out = self._folder / f"answers-{self._num_jobs}.jsonl"
        params = SamplingParams(temperature=0.0)
        files = CountedFiles()
        runner = JobRunner(
            out,
            job_input,
            lambda: nullcontext(llm),
            OutputEncoding(SaveOptions(), JsonlFormat, job_input.media_root),
            JobDescription(
                {"model": "bench", **sampling_parts(params), **job_input.fingerprint_parts()},
                job_input.identify(),
            ),
            JobOptions(in_flight=2 * llm.engine_config.max_num_seqs),
            files=files,
        )
        with _watched(llm, rows) as figures:
            result = runner.run()
        if result.exit_code != 0 or result.counts.rows != count:
            raise RuntimeError(
                f"all {count} rows must be answered, got {result.counts} {result.message}"
            )
        _check_tokens(result.run.completion_tokens, rows)
        return {
            **figures,
            "prompt_tokens": result.run.prompt_tokens,
            "check_seconds": check_seconds,
            **_job_figures(result),
            **files.figures,
        }


@contextmanager
def _watched(llm: LLM, rows: RowsOnDisk) -> Iterator[Figures]:
    """Measure the block, which answers ``rows``; what is yielded has the figures behind it."""
    figures: Figures = {}
    with counted_compilations() as compilations:
        before, cpu, begin = llm.engine.clock.read(), time.process_time(), time.perf_counter()
        yield figures
        synchronize(llm.model.device)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        after = llm.engine.clock.read()
    figures |= {
        "requests": rows.count,
        "new_tokens": rows.new_tokens,
        "ms": 1e3 * seconds,
        "requests_per_s": rows.count / seconds,
        "new_tokens_per_s": rows.new_tokens / seconds,
        "cpu_seconds": cpu,
        **time_figures(before, after, seconds),
        "compiled_kernels": compilations.kernels,
        "captured_graphs": compilations.graphs,
    }


def check_input(job_input: JobInput, llm: LLM) -> None:
    """Check all rows as ``idefics2 run`` does before it loads the model.

    Raises:
        RuntimeError: A row is bad.
    """
    media = llm.processor.media
    check_file = SourceCheck(media)
    found = validate(job_input, lambda row: image_error(row, ImageCheck.EXISTS, media, check_file))
    if found.num_bad or found.num_repeated:
        raise RuntimeError(f"all rows must be good, got {found.counts}")


def run_lines(row: Figures) -> str:
    """Return where a job waited, for people who watch."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["thread_seconds"].items())
    device = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["device_seconds"].items())
    lines = [f"engine's thread, s: {parts}; device, s: {device}"]
    if "starved_share" in row:
        lines.append(
            f"without a row {row['starved_share']:.2%} of the time; waits, s: "
            + ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["waits"].items())
            + f"; {row['syncs']} syncs, {row['sync_seconds']:.2f} s"
        )
    if row.get("advice"):
        lines.append(row["advice"])
    return "\n".join(f"  {line}" for line in lines)


def _job_figures(result: JobResult) -> Figures:
    waits = result.waits
    idle = waits.idle_seconds or 0.0
    return {
        "starved_share": idle / waits.run_seconds,
        "waits": {
            "reader_for_window": waits.window_seconds,
            "engine_for_rows": idle,
            "writer_for_answers": waits.answer_seconds,
        },
        "read_seconds": waits.read_seconds,
        "write_seconds": waits.write_seconds,
        "advice": waits.advice(),
    }


def _median(rounds: Sequence[Figures]) -> Figures:
    """Return the round with the median time, with the times of all."""
    ordered = sorted(rounds, key=lambda row: float(row["ms"]))
    return {**ordered[(len(ordered) - 1) // 2], "rounds_ms": [row["ms"] for row in ordered]}


def _raise_error(output: RequestOutput) -> None:
    if output.error is not None:
        raise output.error


def _check_tokens(got: int, rows: RowsOnDisk) -> None:
    if got != rows.new_tokens:
        raise RuntimeError(f"all answers must have {rows.new_tokens} tokens, got {got}")
