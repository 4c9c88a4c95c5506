"""An engine for tests of actors, whose process is killed once."""

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from idefics2_engine.outputs import RowOutputs
from idefics2_engine.row import Row
from stand_in_engine import StandInEngine

NAME = "ray_row_engine:KilledOnce"


class KilledOnce(StandInEngine):
    """The stand-in engine, killed at one row.

    Args:
        killed: A file that says that a process was killed.
        key: Key of the row.
    """

    def __init__(self, killed: str, key: str) -> None:
        super().__init__()
        self._killed = Path(killed)
        self._key = key

    def iterate(self, prompts: Iterable[Row], **options: Any) -> RowOutputs:
        return super().iterate(self._watched(prompts), **options)

    def _watched(self, prompts: Iterable[Row]) -> Iterator[Row]:
        for row in prompts:
            if row.key == self._key and not self._killed.exists():
                self._killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield row
