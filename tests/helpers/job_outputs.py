"""Rows and outputs of jobs as an engine gives them, for tests of writers. Without torch."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.writers.row_error import make_row_error
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer, encode_error
from idefics2_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from idefics2_engine.sampling_params import SamplingParams

INFO = ImageInfo(40, 30, "ab" * 32, "RGB", "PNG", 6, ("cut off",))


@dataclass
class Totals:
    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    images: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0


def job_row(number: int = 0, id: str | int | None = None, **changes: Any) -> JobRow:
    row = JobRow(
        index=number,
        number=number,
        id=f"row-{number}" if id is None else id,
        key=hashlib.sha256(b"%d" % number).hexdigest(),
        place=f"in.jsonl: line {number + 1}",
        prompt="What is this?",
    )
    return replace(row, **changes)


def completion(index: int = 0, text: str = "A star.", scored: bool = False) -> CompletionOutput:
    places = [
        {5: Logprob(-0.1, 1, " A")},
        {7: Logprob(float("-inf"), 9, " star"), 5: Logprob(-0.25, 1, " A")},
    ]
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=[5, 7],
        cumulative_logprob=float("-inf") if scored else None,
        logprobs=places if scored else None,
        finish_reason="stop",
        stop_reason=None,
    )


def request_output(*answers: CompletionOutput, **changes: Any) -> RequestOutput:
    output = RequestOutput(
        request_id="3",
        prompt="<image>What is this?",
        prompt_token_ids=[1, 2, 3, 4],
        prompt_logprobs=None,
        outputs=list(answers) or [completion()],
        finished=True,
        metrics=RequestMetrics(1.0, 2.0, 4.5),
        num_cached_tokens=2,
        key="a1",
        num_image_tokens=2,
        num_patches=12,
        image_info=(INFO,),
    )
    return replace(output, **changes)


ALL = SaveOptions(token_ids=True, logprobs=True, prompt=True, image_info=True)


def mixed_rows(count: int, save: SaveOptions = ALL) -> list[bytes]:
    """Return rows that begin with errors, with all that a format must carry."""
    rows = []
    for number in range(count):
        row = job_row(
            number,
            id=number if number % 3 == 2 else f"é\n{number}",
            keep={"title": "\u2028 \ud800", "n": [1, None, 0.1]} if number % 2 else {},
            sampling_params=SamplingParams(n=2, logprobs=1),
        )
        if number < 3 or number % 5 == 0:
            rows.append(encode_error(row, make_row_error("image", f"images[{number}]: no")))
            continue
        scored = number % 2 == 0
        stops: list[int | str | None] = [None, 7, "###", "half \ud83d"]
        answers = [
            replace(completion(index, text, scored), stop_reason=stops[number % 4])
            for index, text in enumerate((f"A star {number}.", ""))
        ]
        rows.append(encode_answer(row, request_output(*answers), save))
    return rows
