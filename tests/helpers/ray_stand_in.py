"""Models for tests of actors, which may kill their process."""

import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from idefics2_engine.errors import PromptError
from idefics2_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from idefics2_engine.row import Row

# No test waits so long unless it fails
SECONDS = 300.0
POISON = "poison"
BAD = "bad"


class StandIn:
    """Answers a prompt with itself in capitals.

    Args:
        model: The folder for a log of starts and rows, one file for each process.
    """

    def __init__(self, model: str | None, **_options: Any) -> None:
        assert model is not None
        self._log = Path(model, f"{os.getpid()}.log")
        self._say("start")

    def submit(self, row: Row) -> Future[RequestOutput]:
        """Answer a row before returning, or kill the process."""
        text = row.prompt["prompt"] if isinstance(row.prompt, dict) else str(row.prompt)
        self._say(text)
        if text.startswith(POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        future: Future[RequestOutput] = Future()
        if text.startswith(BAD):
            future.set_exception(PromptError("prompt must be good, got a bad one"))
        else:
            future.set_result(answer(row.key, text))
        return future

    def close(self) -> None:
        """Do nothing."""

    def _say(self, line: str) -> None:
        with self._log.open("a", errors="backslashreplace") as log:
            log.write(f"{line}\n")


class Crowd:
    """Answers when a number of rows is in flight, and later ones at once.

    Args:
        model: Ignored.
        size: The number.
    """

    def __init__(self, model: str | None, size: int) -> None:
        self._size = size
        self._waiting: list[tuple[Future[RequestOutput], Row]] = []
        # Rows that never become so many fail, so that the test ends
        self._timer = threading.Timer(SECONDS, self._fail)
        self._timer.start()

    def submit(self, row: Row) -> Future[RequestOutput]:
        """Answer all rows if they are enough."""
        future: Future[RequestOutput] = Future()
        self._waiting.append((future, row))
        if len(self._waiting) >= self._size:
            self._timer.cancel()
            for other, its_row in self._waiting:
                if not other.done():
                    other.set_result(answer(its_row.key, "crowd"))
        return future

    def close(self) -> None:
        """Do nothing."""

    def _fail(self) -> None:
        for future, _ in self._waiting:
            future.set_exception(PromptError(f"{len(self._waiting)} rows are in flight"))


class DemoKilledOnce:
    """The demo model, whose process is killed at one of its rows.

    Args:
        model: A folder, in which a file says that a process was killed.
        kill_at: The number of the row.
    """

    def __init__(self, model: str, kill_at: int, **options: Any) -> None:
        # Ray's driver imports this module
        from idefics2_engine import LLM

        self._llm = LLM(**options)
        self._killed = Path(model, "killed")
        self._until = kill_at

    def submit(self, row: Row) -> Future[RequestOutput]:
        """Submit a row, unless the process is killed."""
        self._until -= 1
        if self._until == 0 and not self._killed.exists():
            self._killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._llm.submit(row)

    def close(self) -> None:
        """Close the model."""
        self._llm.close()


def answer(key: str | int, text: str) -> RequestOutput:
    """Return the output of a prompt."""
    tokens = list(text.encode(errors="backslashreplace"))
    completion = CompletionOutput(0, text.upper(), tokens, None, None, "stop", None)
    metrics = RequestMetrics(1.0, 2.0, 3.0)
    return RequestOutput("0", text, tokens, None, [completion], True, metrics, 0, key=key)


def logged(folder: Path) -> list[str]:
    """Return all lines of all logs."""
    return [line for file in folder.glob("*.log") for line in file.read_text().splitlines()]
