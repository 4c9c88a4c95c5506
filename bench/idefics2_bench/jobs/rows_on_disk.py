"""A job's input as files: the requests of an offline workload, as JPEG files and a JSONL file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from idefics2_bench.offline_workloads import OfflineRequest, offline_requests
from idefics2_engine import SamplingParams
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.prompts.processor import Processor

# Drawn at once, so that a long job's images are not all in memory
_AT_ONCE = 500
# Other requests than those of ``idefics2 bench offline``
_SEED = 7000


@dataclass(frozen=True)
class RowsOnDisk:
    """A job's input.

    Attributes:
        folder: Where its files are.
        count: Rows.
        new_tokens: Tokens of all answers together.
    """

    folder: Path
    count: int
    new_tokens: int

    def input(self) -> JobInput:
        """Return the input as ``idefics2 run`` reads it."""
        options = InputOptions(inputs=(str(_rows_path(self.folder)),), media_root=self.folder)
        return JobInput(options, SamplingParams(temperature=0.0))


def write_rows(folder: Path, processor: Processor, count: int, shrink: int) -> RowsOnDisk:
    """Write ``count`` requests of the workload ``mixed`` into ``folder``, which is made.

    A row's text is that of the request's tokens. Its tokens are a few more, since random tokens are
    not how a tokenizer splits their text.

    Args:
        folder: A folder that does not exist.
        processor: That of the model.
        count: Rows.
        shrink: Divisor of text and new tokens.
    """
    folder.mkdir()
    new_tokens = 0
    with open(_rows_path(folder), "w", encoding="utf-8") as file:
        for number, request in enumerate(_requests(processor, count, shrink)):
            names = [f"{number}-{place}.jpg" for place in range(len(request.images))]
            for name, image in zip(names, request.images, strict=True):
                (folder / name).write_bytes(image)
            sampling = {"max_tokens": request.max_tokens, "ignore_eos": True}
            row = {
                "id": number,
                "images": names,
                "prompt": _text(request.prompt_token_ids, processor),
                "sampling": sampling,
            }
            file.write(json.dumps(row) + "\n")
            new_tokens += request.max_tokens
    return RowsOnDisk(folder, count, new_tokens)


def _requests(processor: Processor, count: int, shrink: int) -> Iterator[OfflineRequest]:
    for begin in range(0, count, _AT_ONCE):
        some = min(_AT_ONCE, count - begin)
        yield from offline_requests("mixed", processor, some, _SEED + begin, shrink)


def _text(token_ids: Sequence[int], processor: Processor) -> str:
    tokenizer = processor.tokenizer
    text: str = tokenizer.decode([id for id in token_ids if id not in tokenizer.control_ids])
    return text


def _rows_path(folder: Path) -> Path:
    return folder / "rows.jsonl"
