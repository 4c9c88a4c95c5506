"""Who computes the rows of a job: this process, worker processes or a Ray cluster."""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options
from idefics2_engine.cli.jobs import job_options, run_options
from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.worker_pool import WorkerPool

if TYPE_CHECKING:
    from idefics2_engine import LLM
    from idefics2_kernels import Ops


class EngineChoice:
    """The engine of a job, which is loaded when it is called.

    Attributes:
        workers: Engines that compute at once.

    Raises:
        ConfigError: The options contradict each other.
    """

    def __init__(self, args: argparse.Namespace, job_input: JobInput) -> None:
        self._args = args
        self._arguments = job_options.llm_arguments(args) | {
            "allowed_media_root": job_input.media_root
        }
        if args.deterministic:
            self._arguments["ops"] = _row_by_row_ops(args.device)
        count = run_options.num_workers(args)
        spec = EngineSpec(self._arguments)
        self._pool: WorkerPool | None = None
        if args.ray is not None:
            self._pool = _ray_workers(spec, count, args.ray)
        elif count != 1:
            self._pool = WorkerPool(spec, count, threads=args.threads)
        self.workers = 1 if self._pool is None else self._pool.num_workers

    def __call__(self) -> AbstractContextManager[RowEngine]:
        """Return a context that loads the engine, and that closes it at the end."""
        return self._pool or _loaded(self._args, self._arguments)


def _ray_workers(spec: EngineSpec, count: int | None, address: str) -> WorkerPool:
    from idefics2_engine.jobs.workers.ray_workers import RayWorkers

    named = None if address == run_options.RAY_DEFAULT else address
    return RayWorkers(spec, count, address=named)


def _row_by_row_ops(name: str) -> "Ops":
    """Return operations whose rows do not depend on each other; ``ConfigError`` on a GPU."""
    from idefics2_engine.device import torch_device
    from idefics2_kernels import ROW_BY_ROW

    device = torch_device(name)
    if device.type != "cpu":
        raise ConfigError(
            f"--deterministic must come with --device cpu, got {device.type}: the kernels' last "
            "bits depend on the rows of a batch"
        )
    return ROW_BY_ROW


@contextmanager
def _loaded(args: argparse.Namespace, arguments: dict[str, Any]) -> "Iterator[LLM]":
    from idefics2_engine import LLM
    from idefics2_engine.cpu_threads import set_cpu_threads

    set_cpu_threads(options.model_folder(args.model), args.threads)
    with LLM(**arguments) as llm:
        yield llm
