"""What the parent and a worker send each other, pickled. Both run this package's code."""

from dataclasses import dataclass
from typing import NamedTuple

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.leases import LeasedRow
from idefics2_engine.jobs.workers.worker_place import WorkerPlace
from idefics2_engine.outputs import RequestMetrics, RequestOutput


@dataclass(frozen=True)
class WorkerMetrics(RequestMetrics):
    """Times of a request, and the number of the worker that answered it."""

    worker: int


class Build(NamedTuple):
    """To a worker, first: build the engine, and log from this level on."""

    spec: EngineSpec
    place: WorkerPlace
    log_level: int


class Begin(NamedTuple):
    """To a worker: iterate over rows that come next, or replay them with the reference."""

    in_flight: int
    max_prepared_bytes: int
    is_replay: bool = False


class Rows(NamedTuple):
    """To a worker: answer these rows. An empty list ends the rows."""

    rows: list[LeasedRow]


class Ready(NamedTuple):
    """From a worker: the engine is built."""


class BuildFailed(NamedTuple):
    """From a worker: the engine cannot be built. ``error`` is None if it is not bad input."""

    error: Idefics2Error | None
    text: str


class Answered(NamedTuple):
    """From a worker: outputs, whose ``request_id`` is the row's number."""

    outputs: list[RequestOutput]


FromWorker = Ready | BuildFailed | Answered
ToWorker = Begin | Rows
