"""What a job asks of an engine: ``LLM`` has it, and so have worker processes and stand-ins."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Row


class Answers(Iterator[RequestOutput], Protocol):
    """Outputs in the order in which they finish.

    ``key`` is that of the row, and ``request_id`` the row's place among the prompts, from "0".
    """

    def drain(self) -> None:
        """Read no more rows, and end after the outputs of those that were read.

        Any thread and any signal handler may call this. It returns at once.
        """

    def close(self) -> None:
        """End, and cancel the requests in flight. A second call does nothing."""


class RowEngine(Protocol):
    """Answers rows."""

    def iterate(
        self,
        prompts: Iterable[Row],
        *,
        in_flight: int | None = None,
        max_prepared_bytes: int = ...,
    ) -> Answers:
        """Answer rows, which are read lazily, at most ``in_flight`` ahead of the answers.

        A bad row gives an output with ``error`` and costs no other row anything.
        """
