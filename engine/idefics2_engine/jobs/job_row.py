"""A row of a job as the reader gives it: a prompt to answer, or the error of a bad row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from idefics2_engine.row import Conversation, Prompt, Row
from idefics2_engine.sampling_params import SamplingParams


class RowError(NamedTuple):
    """Why a row has no answer. It is part of the output, so it is the same for the same row.

    Attributes:
        code: Stable short name for machines, as in ``docs/errors.md``.
        stage: Where it happened: ``parse``, ``prepare``, ``media`` or ``engine``.
        message: At most 500 characters, without paths outside the media root, addresses or
            credentials.
    """

    code: str
    stage: str
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class JobRow:
    """One row of a job.

    Attributes:
        index: Place among the rows of this job (of its shard), from 0 without gaps. The journal and
            the writer know the row by it.
        number: Place in the input, from 0. It is ``row`` of the output.
        id: Identifier of the row, unique in the job. It is the key of the engine's ``Row``, so the
            row's seed depends on it.
        key: SHA-256 in hex of everything that the answer depends on, as the reader sees it.
        place: Where the row is, such as ``questions.jsonl: line 12``, for messages to the operator.
        prompt: What to answer. None if the row has an error.
        sampling_params: Parameters of the row: the job's, changed by its own.
        keep: Columns that the output carries.
        error: Why the row cannot be answered.
    """

    index: int
    number: int
    id: str | int
    key: str
    place: str
    prompt: Prompt | Conversation | None
    sampling_params: SamplingParams | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)
    error: RowError | None = None

    def to_engine(self) -> Row:
        """Return the row as the engine takes it."""
        assert self.prompt is not None
        return Row(self.id, self.prompt, self.sampling_params)
