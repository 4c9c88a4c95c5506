"""An engine without torch, for tests of workers: an answer is a hash of its row.

A prompt may have an order for the worker that reads it, such as ``kill``.
"""

import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable
from typing import Any

from idefics2_engine.errors import ConfigError, PromptError
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
        fails: What happens when the engine is built: ``config``, ``memory`` or ``kill``.
        says: A line that it logs.
    """

    def __init__(self, max_num_seqs: int = 4, fails: str = "", says: str = "") -> None:
        if says:
            logging.getLogger("idefics2_engine.stand_in").info(says)
            print(f"printed {says}", file=sys.stderr, flush=True)
        if fails == "config":
            raise ConfigError("model must be a folder, got 'nowhere'")
        if fails == "memory":
            raise MemoryError("no room for the weights")
        if fails == "kill":
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def iterate(
        self, prompts: Iterable[Row], *, in_flight: int | None = None, max_prepared_bytes: int = 1
    ) -> RowOutputs:
        return RowOutputs(self._answers(prompts), lambda: None)

    def _answers(self, prompts: Iterable[Row]) -> Generator[RequestOutput, None, None]:
        for place, row in enumerate(prompts):
            order = row.prompt.get("order") if isinstance(row.prompt, dict) else None
            if order == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if order == "raise":
                raise RuntimeError("the engine is broken")
            if order == "error":
                yield failed_output(
                    str(place), PromptError("prompt must be good, got bad"), row.key
                )
            else:
                yield answer(row, place)


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
