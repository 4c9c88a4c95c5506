"""Threads that run functions from a queue, without a lock that an interrupt could leave locked."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

_logger = logging.getLogger(__name__)

Tasks = SimpleQueue[Callable[[], None] | None]


class TaskThreads:
    """Threads that run functions in the order of ``put``. They do not keep the process alive.

    ``ThreadPoolExecutor`` holds locks in its caller's thread, and waits for its threads at exit.

    Args:
        name: Name of the threads.
        count: Threads.
    """

    def __init__(self, name: str, count: int) -> None:
        self._tasks: Tasks = SimpleQueue()
        # A thread must not refer to this object, whose owner may be garbage-collected
        self._threads = [
            threading.Thread(target=_run, args=(self._tasks,), name=name, daemon=True)
            for _ in range(count)
        ]

    def start(self) -> None:
        """Start the threads; called once."""
        for thread in self._threads:
            thread.start()

    def put(self, task: Callable[[], None]) -> None:
        """Run ``task`` on one of the threads."""
        self._tasks.put(task)

    def close(self) -> None:
        """End the threads after all tasks that were put before, without waiting for it."""
        self._tasks.put(None)


def _run(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        try:
            task()
        except BaseException:
            _logger.exception("a task of %s failed", threading.current_thread().name)
        # It may hold images
        del task
    # The next thread ends as well
    tasks.put(None)
