"""What a worker does with the messages of its parent, however they travel."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import cast

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.shadow.replay import AnsweredRow, replay_rows
from idefics2_engine.jobs.workers.messages import (
    Begin,
    BuildFailed,
    Rows,
    ToWorker,
    WorkerMetrics,
)
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Row

_MOST_CHARACTERS = 500


def answer_rows(
    engine: RowEngine, begin: Begin, inbox: SimpleQueue[ToWorker], worker: int
) -> Iterator[RequestOutput]:
    """Answer or replay the rows of ``inbox`` until they end; ``request_id`` is a row's number."""
    # By place among the rows of this worker
    numbers: dict[str, int] = {}

    def rows() -> Iterator[Row]:
        place = 0
        while isinstance(message := inbox.get(), Rows) and message.rows:
            for number, payload in message.rows:
                numbers[str(place)] = number
                place += 1
                yield pickle.loads(payload)

    outputs: Iterator[RequestOutput]
    if begin.is_replay:
        outputs = replay_rows(engine, cast(Iterator[AnsweredRow], rows()))
    else:
        outputs = engine.iterate(
            rows(), in_flight=begin.in_flight, max_prepared_bytes=begin.max_prepared_bytes
        )
    for output in outputs:
        yield _numbered(output, numbers.pop(output.request_id), worker)


def build_failed(error: Exception) -> BuildFailed:
    """Return the message that the engine cannot be built."""
    text = f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS]
    return BuildFailed(error if isinstance(error, Idefics2Error) else None, text)


def _numbered(output: RequestOutput, number: int, worker: int) -> RequestOutput:
    times = output.metrics
    metrics = WorkerMetrics(times.arrival_time, times.first_token_time, times.finished_time, worker)
    return replace(output, request_id=str(number), metrics=metrics)
