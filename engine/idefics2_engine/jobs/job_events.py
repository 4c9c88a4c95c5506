"""What other threads tell the thread that runs a job, through one queue."""

from queue import SimpleQueue
from typing import NamedTuple

from idefics2_engine.jobs.row_engine import Answers
from idefics2_engine.jobs.row_feed import RowRead
from idefics2_engine.outputs import RequestOutput


class Ended(NamedTuple):
    """The engine has no more answers, because of ``error`` if there is one."""

    error: BaseException | None


class Interrupted(NamedTuple):
    """Somebody asked to end the run."""


Event = RowRead | RequestOutput | Ended | Interrupted
Events = SimpleQueue[Event]


def send_answers(answers: Answers, events: Events) -> None:
    """Send answers and their end to ``events``."""
    error: BaseException | None = None
    try:
        for output in answers:
            events.put(output)
    except BaseException as raised:
        error = raised
    events.put(Ended(error))
