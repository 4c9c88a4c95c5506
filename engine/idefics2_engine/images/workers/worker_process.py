"""The start, the use and the end of one worker process.

A process starts in a fraction of a second, because it imports neither torch nor the caller's main
module.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from idefics2_engine.images.workers.frames import receive, send
from idefics2_engine.images.workers.shared_memory import Block, SharedMemory

_START_SECONDS = 60.0
_PACKAGES = Path(__file__).parents[2]
# Isolated: no variable of the environment and no file of the working directory changes what the
# process imports. It finds modules where this process does
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from idefics2_engine.images.workers.worker import main
main(*map(int, sys.argv[2:]))
"""
# Libraries of numpy would start a thread for every core
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerEndedError(Exception):
    """A worker ended before it replied; the argument says how."""


class WorkerProcess:
    """A process that decodes image files.

    Args:
        memory: The memory that it writes to.
        spare: Its own place there, used when the shared room is full.

    Attributes:
        spare: The place.
        pid: Id of the process.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, memory: SharedMemory, spare: Block) -> None:
        if not sys.executable or hasattr(sys, "frozen"):
            raise OSError("there is no Python interpreter to start")
        self.spare = spare
        self._connection, theirs = socket.socketpair()
        fds = theirs.fileno(), memory.fd
        paths = json.dumps([*map(str, sys.path), str(_PACKAGES)])
        arguments = [paths, *map(str, fds), str(memory.size)]
        with contextlib.ExitStack() as on_error, theirs:
            on_error.callback(self._connection.close)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=fds,
                env=os.environ | _ONE_THREAD,
                # An interrupt at the terminal goes to the foreground's processes
                process_group=0,
            )
            on_error.pop_all()
        self.pid = self._process.pid

    def wait_until_ready(self) -> None:
        """Wait for the process's imports.

        Raises:
            WorkerEndedError: It ended, or took too long.
        """
        self._connection.settimeout(_START_SECONDS)
        try:
            if receive(self._connection) is None:
                raise WorkerEndedError(self.end())
        except TimeoutError:
            self.end()
            raise WorkerEndedError(f"did not start within {_START_SECONDS:g} s") from None
        self._connection.settimeout(None)

    def ask(self, header: dict[str, Any], data: bytes) -> dict[str, Any]:
        """Send a job and wait for the reply.

        Raises:
            WorkerEndedError: The process ended before.
        """
        with contextlib.suppress(ConnectionError):
            send(self._connection, header, data)
            reply = receive(self._connection)
            if reply is not None:
                return reply[0]
        raise WorkerEndedError(self.end())

    def end(self) -> str:
        """Kill the process if it runs, and return how it ended."""
        # A process whose socket is closed ends on its own, so it is given a moment to say why
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        self.kill()
        code = self._process.wait()
        self._connection.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Kill the process and wait for its end; whoever waits for its reply is told."""
        self._process.kill()
        self._process.wait()
