"""What a run came to: how it ended, what it counted, and the exit code of the command."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from idefics2_engine.jobs.stage_waits import StageWaits
from idefics2_engine.jobs.store.input_files import InputChange
from idefics2_engine.jobs.store.job_outputs import WrittenOutput
from idefics2_engine.jobs.store.journal import Recovery


class Ending(Enum):
    """How a run ended. All endings but the first two leave a job that can be resumed."""

    COMPLETE = "complete"
    COMPLETE_BEFORE = "complete before"
    INTERRUPTED = "interrupted"
    TOO_MANY_ERRORS = "too many errors"
    OUTPUT_LOST = "output lost"


_EXIT_CODES = {
    Ending.COMPLETE_BEFORE: 0,
    Ending.TOO_MANY_ERRORS: 4,
    Ending.OUTPUT_LOST: 5,
    Ending.INTERRUPTED: 130,
}
_WITH_ERRORS = 3
_NOTHING = Recovery(0, 0, 0)


@dataclass
class RowCounts:
    """Counts of finished rows.

    Attributes:
        rows: Finished rows.
        errors: Error rows by code.
        images: Images of answered rows.
        prompt_tokens: Tokens of prompts of answered rows, including image tokens.
        image_tokens: Image tokens of answered rows.
        completion_tokens: Tokens of answers.
    """

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    images: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0

    @property
    def num_errors(self) -> int:
        """Error rows."""
        return self.errors.total()

    def add(self, out: Mapping[str, Any]) -> None:
        """Add a row of the output."""
        self.rows += 1
        if (error := out.get("error")) is not None:
            self.errors[error["code"]] += 1
        usage = out.get("usage") or {}
        self.images += usage.get("images", 0)
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.image_tokens += usage.get("image_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", 0)


@dataclass
class RunCounts(RowCounts):
    """Counts of rows that this run finished, and which the journal did not have.

    Attributes:
        computed: Rows that the engine was asked for.
        repeated: How often it was asked again because of an error.
        patches: Patches of images of answered rows.
    """

    computed: int = 0
    repeated: int = 0
    patches: int = 0


@dataclass(frozen=True)
class JobResult:
    """The result of a run.

    Attributes:
        ending: How it ended.
        counts: Counts of all finished rows.
        run: Counts of those that this run finished.
        seconds: Duration, without loading the model and comparing rows.
        load_seconds: Time in which the model was loaded. 0 if it was not needed.
        waits: How long each stage waited.
        shadow: Agreement of rows that were compared with the reference path. ``None`` without
            ``ShadowRows``.
        shadow_run: What the run spent on comparing them, the fields of ``ShadowRun``.
        message: Why the job did not complete. Empty if it did.
        output: The complete output.
        recovered: What was found in the journal on start.
        input_changes: Input files that differ from those of the last start.
        moved: What was moved aside, under its new names.
        num_unchecked: Rows of the journal that were not compared with the input before the run
            ended. They are in no count.
    """

    ending: Ending
    counts: RowCounts
    run: RunCounts = field(default_factory=RunCounts)
    seconds: float = 0.0
    load_seconds: float = 0.0
    waits: StageWaits = field(default_factory=StageWaits)
    shadow: Mapping[str, Any] | None = None
    shadow_run: Mapping[str, Any] | None = None
    message: str = ""
    output: WrittenOutput | None = None
    recovered: Recovery = _NOTHING
    input_changes: tuple[InputChange, ...] = ()
    moved: tuple[Path, ...] = ()
    num_unchecked: int = 0

    @property
    def from_journal(self) -> int:
        """Rows that the journal had."""
        return self.counts.rows - self.run.rows

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        if self.ending is Ending.COMPLETE:
            return _WITH_ERRORS if self.counts.num_errors else 0
        return _EXIT_CODES[self.ending]
