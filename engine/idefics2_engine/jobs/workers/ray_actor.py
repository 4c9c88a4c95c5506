"""The actor of ``RayWorkers``: it builds an engine and answers the rows that the driver sends."""

import logging
from collections.abc import Iterator
from queue import SimpleQueue

from idefics2_engine.jobs.workers.engine_spec import EngineSpec, build_engine
from idefics2_engine.jobs.workers.messages import Answered, Begin, FromWorker, Ready, ToWorker
from idefics2_engine.jobs.workers.row_service import answer_rows, build_failed
from idefics2_engine.jobs.workers.worker_place import WorkerPlace

_logger = logging.getLogger(__name__)

# Groups of Ray, with one thread each, so that messages keep their order
IN = "in"
OUT = "out"


class RowActor:
    """Answers rows in a process of Ray.

    Args:
        spec: What to build.
        place: Number of the worker and its share of the cores.
    """

    def __init__(self, spec: EngineSpec, place: WorkerPlace) -> None:
        self._spec = spec
        self._place = place
        self._inbox: SimpleQueue[ToWorker] = SimpleQueue()

    def receive(self, message: ToWorker) -> None:
        """Take a message of the driver. Runs in the group ``IN``."""
        self._inbox.put(message)

    def messages(self) -> Iterator[FromWorker]:
        """Yield messages to the driver, as a worker process sends them. Runs in ``OUT``."""
        try:
            engine = build_engine(self._spec, self._place)
        except Exception as error:
            _logger.exception("the engine cannot be built")
            yield build_failed(error)
            return
        yield Ready()
        while True:
            begin = self._inbox.get()
            assert isinstance(begin, Begin)
            for output in answer_rows(engine, begin, self._inbox, self._place.number):
                yield Answered([output])
