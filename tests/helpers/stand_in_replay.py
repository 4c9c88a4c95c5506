"""A stand-in engine that replays rows: what it finds is a hash of the row. Without torch."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from zlib import crc32

import stand_in_engine
from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.errors import PromptError
from idefics2_engine.jobs.shadow.replay import AnsweredRow, ReplayedOutput
from idefics2_engine.outputs import RequestMetrics, RequestOutput, failed_output
from stand_in_run import StandInEngine


def agreement_of(row_id: object, answers: Iterable[Iterable[int]]) -> TokenAgreement:
    """Return what the stand-in finds for a row."""
    tokens = sum(len(list(ids)) for ids in answers)
    kl = crc32(str(row_id).encode()) / 2**40
    return TokenAgreement(tokens, tokens, total_kl=tokens * kl, largest_kl=kl)


def replayed(row: AnsweredRow, place: int) -> RequestOutput:
    now = time.monotonic()
    fields: dict[str, Any] = dict.fromkeys(("prompt_logprobs", "error"))
    return ReplayedOutput(
        request_id=str(place),
        prompt="",
        prompt_token_ids=[],
        outputs=[],
        finished=True,
        metrics=RequestMetrics(now, None, now),
        num_cached_tokens=0,
        key=row.key,
        agreement=agreement_of(row.key, row.answers),
        **fields,
    )


class ReplayingEngine(StandInEngine):
    """Replays rows as well.

    Args:
        on_replay: Called with the key of each row before its output.
        bad: Keys of rows that cannot be replayed.

    Attributes:
        replayed: Keys of rows, in order.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        on_replay: Callable[[object], None] = lambda _key: None,
        bad: Iterable[object] = (),
        **options: Any,
    ) -> None:
        super().__init__(seed, **options)
        self.on_replay = on_replay
        self.bad = set(bad)
        self.replayed: list[object] = []

    def replay(self, rows: Iterable[AnsweredRow]) -> Iterator[RequestOutput]:
        for place, row in enumerate(rows):
            self.replayed.append(row.key)
            self.on_replay(row.key)
            if row.key in self.bad:
                yield failed_output(str(place), PromptError("prompt must be there"), row.key)
            else:
                yield replayed(row, place)


class PooledEngine(stand_in_engine.StandInEngine):
    """An engine of a worker process that replays rows; the prompt ``kill`` ends the process."""

    def replay(self, rows: Iterable[AnsweredRow]) -> Iterator[RequestOutput]:
        for place, row in enumerate(rows):
            if row.prompt == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            yield replayed(row, place)
