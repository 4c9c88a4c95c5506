"""The parent's side of one worker process: its start, its messages, its log and its end."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import idefics2_engine
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.messages import Build, FromWorker, ToWorker
from idefics2_engine.jobs.workers.worker_main import LOG_MARK
from idefics2_engine.jobs.workers.worker_place import WorkerPlace

_logger = logging.getLogger(__name__)

_PACKAGES = Path(__file__).parents[3]
# Isolated: nothing in the working directory changes what the process imports, and the caller's main
# module is not imported. Modules are found where the parent finds them
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from idefics2_engine.jobs.workers.worker_main import main
main(int(sys.argv[2]))
"""
_LINE_BYTES = 4096
_LAST_LINES = 20
_LAST_CHARACTERS = 2000
# A process whose connection is closed is about to end, and so is its standard error
_END_SECONDS = 2.0


class Ended(NamedTuple):
    """A worker process ended.

    Attributes:
        how: Its exit code or signal.
        last_words: The end of what it wrote to standard error.
    """

    how: str
    last_words: str


class Worker(Protocol):
    """The parent's side of a worker, wherever it runs.

    Attributes:
        place: Where it computes.
        is_ready: Whether its engine is built. The owner sets it.
    """

    place: WorkerPlace
    is_ready: bool

    def send(self, message: ToWorker) -> None:
        """Send a message. If the worker ended, ``Ended`` comes."""

    def kill(self) -> None:
        """Kill the worker, without waiting for its end."""


Put = Callable[[Worker, FromWorker | Ended], None]
Start = Callable[[EngineSpec, WorkerPlace, Put], Worker]


class WorkerProcess:
    """A process that builds an engine. Its messages arrive on a thread of its own.

    The process is started on creation, in a process group of its own, because an interrupt at the
    terminal goes to the foreground's processes.

    Args:
        spec: What it builds.
        place: Where it computes.
        put: Called with each message, and last with ``Ended``.

    Attributes:
        place: Where it computes.
        pid: Its id.
        is_ready: Whether its engine is built. The owner sets it.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, spec: EngineSpec, place: WorkerPlace, put: Put) -> None:
        if not sys.executable or hasattr(sys, "frozen"):
            raise OSError("there is no Python interpreter to start")
        self.place = place
        self.is_ready = False
        self._put = put
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._connection, theirs = Pipe()
        with theirs:
            fd = theirs.fileno()
            paths = json.dumps([*map(str, sys.path), str(_PACKAGES)])
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, paths, str(fd)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[fd],
                env=os.environ | place.environment(),
                process_group=0,
            )
        self.pid = self._process.pid
        level = logging.getLogger(idefics2_engine.__name__).getEffectiveLevel()
        assert self._process.stdout is not None
        self._log = threading.Thread(
            target=self._read_log, args=(self._process.stdout,), name="idefics2-log", daemon=True
        )
        self._log.start()
        self.send(Build(spec, place, level))
        threading.Thread(target=self._receive, name="idefics2-receive", daemon=True).start()

    def send(self, message: ToWorker | Build) -> None:
        """Send a message. If the process ended, ``Ended`` comes."""
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def kill(self) -> None:
        """Kill the process, without waiting for its end."""
        self._process.kill()

    def _receive(self) -> None:
        # What is received from a process that is killed in the middle of a message is not one
        with contextlib.suppress(Exception):
            while True:
                self._put(self, self._connection.recv())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        code = self._process.wait()
        self._log.join(_END_SECONDS)
        self._connection.close()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._put(self, Ended(how, "\n".join(self._last_lines)[-_LAST_CHARACTERS:]))

    def _read_log(self, stream: IO[bytes]) -> None:
        """Log what the process writes, with the number of the worker."""
        with stream:
            while line := stream.readline(_LINE_BYTES):
                name, level, text = _record(line.decode(errors="replace").rstrip())
                if text:
                    self._last_lines.append(text)
                    logging.getLogger(name).log(level, "worker %d: %s", self.place.number, text)


def _record(line: str) -> tuple[str, int, str]:
    """Return logger, level and text of a line, which is a log record or something else."""
    if line.startswith(LOG_MARK):
        with contextlib.suppress(ValueError):
            level, name, text = json.loads(line.removeprefix(LOG_MARK))
            return name, level, text
    return __name__, logging.WARNING, line
