"""The running processes of a pool, and which of them may be started."""

from collections.abc import Sequence

from idefics2_engine.jobs.workers.death_count import DeathCount
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.worker_place import WorkerPlace
from idefics2_engine.jobs.workers.worker_process import Put, Start, Worker, WorkerProcess


class WorkerPoolError(RuntimeError):
    """Workers cannot go on, for a reason that is not the input's."""


class WorkerProcesses:
    """At most one process at each place.

    Args:
        spec: What each process builds.
        places: Where.
        put: Called with the messages of all processes, on their threads.
        start: Starts one. If ``None``, it is a process of this machine.

    Attributes:
        deaths: Counts processes that ended by themselves.
    """

    def __init__(
        self,
        spec: EngineSpec,
        places: Sequence[WorkerPlace],
        put: Put,
        start: Start | None = None,
    ) -> None:
        self.deaths = DeathCount(len(places))
        self._spec = spec
        self._put = put
        self._start = start
        self._by_number: dict[int, Worker] = {}

    @property
    def running(self) -> list[Worker]:
        """The processes, by number of the worker."""
        return [process for _, process in sorted(self._by_number.items())]

    def find(self, worker: int) -> Worker | None:
        """Return the process of a worker, if it runs."""
        return self._by_number.get(worker)

    def start(self, place: WorkerPlace) -> None:
        """Start a process, unless its worker is given up or has to wait.

        Raises:
            WorkerPoolError: It cannot be started.
        """
        if self.deaths.is_given_up(place.number) or self._must_wait(place):
            return
        start = self._start or WorkerProcess
        try:
            self._by_number[place.number] = start(self._spec, place, self._put)
        except OSError as error:
            self.kill_all()
            raise WorkerPoolError(f"worker {place.number} cannot be started: {error}") from error

    def remove_dead(self, process: Worker) -> None:
        """Forget a process that ended by itself, and count its death."""
        del self._by_number[process.place.number]
        self.deaths.died(process.place.number, was_ready=process.is_ready)

    def kill(self, worker: int) -> None:
        """Kill the process of a worker and forget it."""
        self._by_number.pop(worker).kill()

    def kill_all(self) -> None:
        """Kill and forget all processes. Any thread may call this."""
        for worker in list(self._by_number):
            if process := self._by_number.pop(worker, None):
                process.kill()

    def _must_wait(self, place: WorkerPlace) -> bool:
        """Return whether another engine is being built on the same GPU, whose memory it measures."""
        return place.device is not None and any(
            process.place.device == place.device and not process.is_ready
            for process in self._by_number.values()
        )
