"""Stand-ins for a model and its rows, which take almost no time. Without torch."""

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from idefics2_engine import Row, SamplingParams
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, RowOutputs

MODEL = {"model": "stand-in", "dtype": "none"}
"""Names of the model in rows of results."""

NUM_IMAGES = 4000
"""Files that the rows of a long input share."""

_ANSWER = "The star is at the top right of the picture, above a blue square."
_IMAGE_SIDES = (20, 120)
# Shorter waits than this are not slept
_LEAST_SLEEP = 0.001


class StandInEngine:
    """Answers each row when it has read it. It is its own context.

    Args:
        rate: Most answers a second. If ``None``, as many as are asked for.
        max_num_seqs: What the spec of workers says.
    """

    def __init__(self, rate: float | None = None, max_num_seqs: int = 64) -> None:
        self._rate = rate

    def __call__(self) -> Self:
        """Return itself."""
        return self

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Do nothing."""

    def iterate(
        self, prompts: Iterable[Row], *, in_flight: int | None = None, max_prepared_bytes: int = 1
    ) -> RowOutputs:
        """Answer ``prompts`` in their order."""
        return RowOutputs(self._answers(prompts), lambda: None)

    def _answers(self, prompts: Iterable[Row]) -> Generator[RequestOutput, None, None]:
        begin = time.perf_counter()
        for place, row in enumerate(prompts):
            if self._rate is not None:
                ahead = begin + place / self._rate - time.perf_counter()
                if ahead > _LEAST_SLEEP:
                    time.sleep(ahead)
            yield stand_in_answer(row, place)


def stand_in_answer(row: Row, place: int) -> RequestOutput:
    """Return an answer of usual length."""
    now = time.monotonic()
    return RequestOutput(
        request_id=str(place),
        prompt="",
        prompt_token_ids=[1] * 100,
        prompt_logprobs=None,
        outputs=[CompletionOutput(0, _ANSWER, [1] * 16, None, None, "stop", None)],
        finished=True,
        metrics=RequestMetrics(now, now, now),
        num_cached_tokens=0,
        key=row.key,
    )


@dataclass(frozen=True)
class StandInRows:
    """``count`` rows of a question, which no file has.

    Attributes:
        count: Rows.
        files: None.
        can_skip: Whether ``rows`` may begin anywhere.
    """

    count: int
    files: tuple[Path, ...] = ()
    can_skip: bool = True

    def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
        """Yield the rows."""
        for index in range(begin, self.count):
            key = sha256(str(index).encode()).hexdigest()
            yield JobRow(index, index, index, key, f"row {index}", "What is this?")


def write_input(folder: Path, count: int) -> None:
    """Write ``rows.jsonl`` with ``count`` rows into ``folder``, and small images that they share."""
    random = np.random.default_rng(0)
    for number in range(min(count, NUM_IMAGES)):
        height, width = random.integers(*_IMAGE_SIDES, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / _image_name(number), "JPEG")
    with open(input_path(folder), "w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "id": f"row {number}",
                "images": [_image_name(number % NUM_IMAGES)],
                "prompt": f"What is in picture {number}, and where is it?",
                "sampling": {"max_tokens": 32},
            }
            file.write(json.dumps(row) + "\n")


def read_input(folder: Path, limit: int | None = None) -> JobInput:
    """Return the input that ``write_input`` wrote, or its first ``limit`` rows."""
    options = InputOptions(inputs=(str(input_path(folder)),), limit=limit)
    return JobInput(options, SamplingParams(temperature=0.0))


def input_path(folder: Path) -> Path:
    """Return the path of the rows."""
    return folder / "rows.jsonl"


def _image_name(number: int) -> str:
    return f"{number:04}.jpg"
