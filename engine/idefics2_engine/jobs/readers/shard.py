"""One of several parts of a job, each of which has every n-th row."""

import os
import re
from typing import NamedTuple

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.field_checks import MismatchError

_SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
_WANTED = "i/n with 0 <= i < n, or auto"


class Shard(NamedTuple):
    """The rows whose position is ``part`` modulo ``num_parts``."""

    part: int = 0
    num_parts: int = 1


def shard(value: object) -> Shard:
    """Accept a ``Shard``, text such as ``0/4``, and ``auto``, which is Slurm's array task.

    Raises:
        MismatchError: The value is something else.
        ConfigError: The value is ``auto`` outside an array job of Slurm.
    """
    if value == "auto":
        return _array_task()
    pair = value if isinstance(value, Shard) else None
    if isinstance(value, str) and (found := re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)):
        pair = Shard(int(found[1]), int(found[2]))
    if pair is None or not 0 <= pair.part < pair.num_parts:
        raise MismatchError(_WANTED, short_repr(value))
    return pair


def _array_task() -> Shard:
    """Return the shard of this task in an array job of Slurm, whose numbers may begin above 0."""
    task, count, first = (os.environ.get(name, "") for name in _SLURM)
    first = first or "0"
    if not all(re.fullmatch(r"\d{1,9}", text) for text in (task, count, first)):
        raise ConfigError(
            f"shard: auto must be in an array job of Slurm, got no {_SLURM[0]} and {_SLURM[1]}"
        )
    index = int(task) - int(first)
    if not 0 <= index < int(count):
        raise ConfigError(
            f"shard: auto must have task numbers without gaps, got task {task} of {count} "
            f"from {first}"
        )
    return Shard(index, int(count))
