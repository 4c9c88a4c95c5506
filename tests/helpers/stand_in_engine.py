"""An engine without torch, for tests of workers: an answer is a hash of its row.

A prompt may have an order for the worker that reads it, such as ``kill``.
"""

import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, ImageWarning, PromptError
from idefics2_engine.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    RowOutputs,
    failed_output,
)
from idefics2_engine.row import Row

NAME = "stand_in_engine:StandInEngine"


class StandInEngine:
    """Answers each row when it has read it.

    Args:
        max_num_seqs: What the spec of workers says.
        fails: What happens when the engine is built: ``config``, ``memory``, ``kill``, or
            ``kill on 9`` where the device 9 is visible.
        says: A line that it logs.
        meets: Path of the ``Meeting`` that it waits for when it has read its first row.
    """

    def __init__(
        self, max_num_seqs: int = 4, fails: str = "", says: str = "", meets: str = ""
    ) -> None:
        self._meets = meets
        if says:
            logging.getLogger("idefics2_engine.stand_in").info(says)
            print(f"printed {says}", file=sys.stderr, flush=True)
            warnings.warn(f"warned {says}", ImageWarning, stacklevel=1)
        if fails == "config":
            raise ConfigError("model must be a folder, got 'nowhere'")
        if fails == "memory":
            raise MemoryError("no room for the weights")
        if fails == "kill" or (fails, os.environ.get("CUDA_VISIBLE_DEVICES")) == ("kill on 9", "9"):
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def iterate(
        self, prompts: Iterable[Row], *, in_flight: int | None = None, max_prepared_bytes: int = 1
    ) -> RowOutputs:
        return RowOutputs(self._answers(prompts, in_flight, max_prepared_bytes), lambda: None)

    def _answers(
        self, prompts: Iterable[Row], in_flight: int | None, max_prepared_bytes: int
    ) -> Generator[RequestOutput, None, None]:
        bounds = {"in_flight": in_flight, "max_prepared_bytes": max_prepared_bytes}
        for place, row in enumerate(prompts):
            if self._meets:
                _wait_for_meeting(self._meets)
                self._meets = ""
            order = row.prompt.get("order") if isinstance(row.prompt, dict) else None
            if order == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if order == "raise":
                raise RuntimeError("the engine is broken")
            if order == "process":
                yield replace(answer(row, place), prompt=json.dumps(_process() | bounds))
            elif order == "error":
                yield failed_output(
                    str(place), PromptError("prompt must be good, got bad"), row.key
                )
            else:
                yield answer(row, place)


class Meeting:
    """Lets processes go on when so many of them wait, so that each of them has a row.

    Attributes:
        path: Its name.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.path = str(folder / "meeting")
        self._count = count
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with self._server:
            waiting = [self._server.accept()[0] for _ in range(self._count)]
        for connection in waiting:
            connection.close()


def _wait_for_meeting(path: str) -> None:
    # Processes that come later meet nobody
    with socket.socket(socket.AF_UNIX) as connection, suppress(ConnectionError):
        connection.connect(path)
        connection.recv(1)


def _process() -> dict[str, Any]:
    """Return what a test asks about the process."""
    return {
        "environment": dict(os.environ),
        "has_torch": "torch" in sys.modules,
        "main": getattr(sys.modules["__main__"], "__file__", None),
    }


def answer(row: Row, place: int = 0) -> RequestOutput:
    digest = hashlib.sha256(repr((row.key, row.prompt)).encode()).hexdigest()
    seconds = time.monotonic()
    return RequestOutput(
        request_id=str(place),
        prompt=str(row.prompt),
        prompt_token_ids=list(digest.encode()),
        prompt_logprobs=None,
        outputs=[CompletionOutput(0, digest, [1, 2], None, None, "stop", None)],
        finished=True,
        metrics=RequestMetrics(seconds, seconds, seconds),
        num_cached_tokens=0,
        key=row.key,
    )


def content(output: RequestOutput) -> tuple[Any, ...]:
    """Return what of an output depends on its row alone."""
    texts = [one.text for one in output.outputs]
    error = output.error and (output.error.code, str(output.error))
    return output.key, output.request_id, output.prompt, texts, error
