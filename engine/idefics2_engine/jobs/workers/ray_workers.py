"""Answers rows on actors of a Ray cluster, whose driver keeps every row until it is answered."""

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.ray_data.processor import check_ray
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.messages import ToWorker
from idefics2_engine.jobs.workers.ray_actor import IN, OUT, RowActor
from idefics2_engine.jobs.workers.worker_place import WorkerPlace
from idefics2_engine.jobs.workers.worker_pool import WorkerPool
from idefics2_engine.jobs.workers.worker_process import Ended, Put

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class RayWorkers(WorkerPool):
    """A ``WorkerPool`` whose workers are actors of a Ray cluster, on any of its machines.

    Rows, their leases and deaths of workers are the driver's business, as with processes. Ray
    starts no actor again and repeats no call. Image files are opened on the actors' machines, so
    paths must be the same there.

    Args:
        spec: What each actor builds.
        count: Actors. If ``None``, one for each GPU of the cluster, and one on a CPU. The cluster
            is then connected at once, and otherwise when the first row was read.
        address: Address of the cluster. If ``None``, that of ``ray.init``: ``RAY_ADDRESS``, a
            cluster on this machine, or a new one.
        num_cpus: CPUs of an actor, which are also its threads.
        num_gpus: GPUs of an actor. If ``None``, 0 with ``device="cpu"`` or in a cluster without
            GPUs, and otherwise 1.
        runtime_env: The environment of the actors, as in ``ray.init``.

    Raises:
        ConfigError: A number is too small, or the cluster cannot be reached.
        ImportError: Ray is not installed.
    """

    def __init__(
        self,
        spec: EngineSpec,
        count: int | None = None,
        *,
        address: str | None = None,
        num_cpus: int = 1,
        num_gpus: float | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        check_ray()
        for name, value in (("workers", count), ("num_cpus", num_cpus)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {short_repr(value)}")
        if spec.device == "cpu":
            num_gpus = 0.0
        self._cluster = RayCluster(address, num_gpus, num_cpus=num_cpus, runtime_env=runtime_env)
        if count is None:
            count = 1 if num_gpus == 0 else max(1, self._cluster.total_gpus())
        # Ray chooses machine and device
        places = [WorkerPlace(number, None, 1, num_cpus) for number in range(count)]
        super().__init__(
            spec, places=places, on_gpu=spec.device != "cpu", start=self._cluster.start
        )

    def close(self) -> None:
        """Kill the actors, and leave the cluster. A second call does nothing."""
        super().close()
        self._cluster.close()


class RayCluster:
    """A cluster, to which this process is connected when it first needs it.

    Args:
        address: Its address, as in ``ray.init``.
        num_gpus: GPUs of an actor. If ``None``, 1 if the cluster has any.
        options: Options of actors, as in ``ray.remote``.
    """

    def __init__(self, address: str | None, num_gpus: float | None, **options: Any) -> None:
        self._address = address
        self._num_gpus = num_gpus
        self._options = options
        self._is_ours = False

    def total_gpus(self) -> int:
        """Return the number of GPUs of the cluster."""
        import ray

        self._connect()
        return int(ray.cluster_resources().get("GPU", 0))

    def start(self, spec: EngineSpec, place: WorkerPlace, put: Put) -> "RayWorker":
        """Start an actor.

        Raises:
            ConfigError: The cluster cannot be reached.
        """
        self._connect()
        if self._num_gpus is None:
            self._num_gpus = 1.0 if self.total_gpus() else 0.0
        return RayWorker(spec, place, put, {**self._options, "num_gpus": self._num_gpus})

    def close(self) -> None:
        """Leave the cluster, unless this process was connected before."""
        import ray

        if self._is_ours:
            self._is_ours = False
            ray.shutdown()

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self._address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(
                "the address of Ray must be that of a running cluster, "
                f"got {short_repr(self._address)}: {_first_line(error)}"
            ) from error
        finally:
            # Ray replaces the handler with one that exits, and a job has its own
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)
        self._is_ours = True


class RayWorker:
    """The driver's side of one actor, with the interface of ``Worker``.

    Args:
        spec: What the actor builds.
        place: Number of the worker and its share of the cores.
        put: Called with each message of the actor, and last with ``Ended``.
        options: Options of the actor, as in ``ray.remote``.

    Attributes:
        place: As given.
        is_ready: Whether its engine is built. The owner sets it.
    """

    def __init__(
        self, spec: EngineSpec, place: WorkerPlace, put: Put, options: dict[str, Any]
    ) -> None:
        import ray

        self.place = place
        self.is_ready = False
        self._put = put
        options = options | {
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {IN: 1, OUT: 1},
        }
        self._actor: ActorHandle = ray.remote(**options)(RowActor).remote(spec, place)
        messages = self._actor.messages.options(num_returns="streaming", concurrency_group=OUT)
        self._messages = messages.remote()
        name = f"idefics2-ray-{place.number}"
        threading.Thread(target=self._receive, name=name, daemon=True).start()

    def send(self, message: ToWorker) -> None:
        """Send a message. If the actor died, ``Ended`` comes."""
        self._actor.receive.options(concurrency_group=IN).remote(message)

    def kill(self) -> None:
        """Kill the actor, without waiting for its end."""
        import ray

        # After a shutdown there is no actor
        if ray.is_initialized():
            ray.kill(self._actor)

    def _receive(self) -> None:
        import ray

        how = "no more messages"
        try:
            for reference in self._messages:
                self._put(self, ray.get(reference))
        except Exception as error:
            how = _first_line(error)
        self._put(self, Ended(how, ""))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
