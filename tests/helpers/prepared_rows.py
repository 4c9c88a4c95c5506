"""A job whose rows are prepared as those of idefics2-8b, for a stand-in that keeps what it gets.

As a program it prints how much memory a job of many large images takes.
"""

import json
import resource
import sys
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.outputs import RequestOutput, RowOutputs
from idefics2_engine.prefetcher import Prefetcher
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.request_builder import RequestBuilder, RowDraft
from idefics2_engine.row import Row
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Request
from paths import EIGHT_B
from pictures import png_file
from stand_in_run import StandInEncoding, answered, row_key

SIDE = 980
# Longer than the preparation of one image, so that the engine gets all that it may
_SECONDS = 0.5


def picture(number: int) -> bytes:
    """Return a PNG file of 980 x 980 pixels that no other number has."""
    row = b"\0" + number.to_bytes(4) + bytes(3 * SIDE - 4)
    return png_file(SIDE, SIDE, zlib.compress(row * SIDE, 1))


class PictureRows:
    """Rows about one image each, which is made when the row is read."""

    can_skip = True
    files: tuple[Path, ...] = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
        for number in range(begin, self.count):
            image = {"type": "image", "image": picture(number)}
            content = [image, {"type": "text", "text": f"Row {number}?"}]
            key = row_key(str(number))
            prompt: Any = [{"role": "user", "content": content}]
            yield JobRow(number, number, number, key, f"row {number}", prompt)


class KeepingEngine:
    """Keeps prepared rows until no more come, and then answers half of them.

    Attributes:
        most_bytes: Most bytes of tiles that it kept.
    """

    def __init__(self) -> None:
        config = ModelConfig.load(EIGHT_B)
        self._processor = Processor.load(EIGHT_B, config, False, MediaConfig(image_threads=2))
        generation = GenerationConfig.of_checkpoint(EIGHT_B, self._processor.tokenizer)
        self._builder = RequestBuilder(self._processor, config, generation, 2048, 0)
        self.most_bytes = 0

    def __enter__(self) -> "KeepingEngine":
        return self

    def __exit__(self, *_error: object) -> None:
        """Have nothing to close."""

    def iterate(
        self,
        prompts: Iterable[Row],
        *,
        in_flight: int | None = None,
        max_prepared_bytes: int = 1,
    ) -> RowOutputs:
        assert in_flight is not None
        prepared: SimpleQueue[Request | None] = SimpleQueue()
        rows: Prefetcher[Row, RowDraft] = Prefetcher(
            prompts,
            lambda: prepared.put(None),
            threads=2,
            ahead=in_flight,
            max_bytes=max_prepared_bytes,
        )
        return RowOutputs(self._answers(rows, prepared), rows.drain)

    def _answers(
        self, rows: Prefetcher[Row, RowDraft], prepared: "SimpleQueue[Request | None]"
    ) -> Generator[RequestOutput, None, None]:
        images = self._builder.reader.job()

        def prepare(index: int, draft: RowDraft) -> None:
            request = self._builder.build_row(draft, str(index), images)
            rows.hold(request.tiles)
            prepared.put(request)

        def read(index: int, row: Row) -> RowDraft:
            return self._builder.read_row(row, SamplingParams(), index)

        kept: deque[Request] = deque()
        num_answered = 0
        with rows.start(read, prepare):
            while not rows.has_ended or num_answered < rows.count:
                try:
                    while True:
                        if (request := prepared.get(timeout=_SECONDS)) is not None:
                            kept.append(request)
                except Empty:
                    held = sum(tile.pixels.nbytes for one in kept for tile in one.tiles)
                    self.most_bytes = max(self.most_bytes, held)
                for _ in range((len(kept) + 1) // 2):
                    request = kept.popleft()
                    assert request.key is not None
                    output = answered(Row(request.key, ""), num_answered)
                    rows.done(request.tiles)
                    num_answered += 1
                    yield replace(output, request_id=request.request_id)


def peak() -> int:
    """Return the most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure(out: Path, num_rows: int, max_prepared_bytes: int) -> None:
    """Run a job, and print how much memory it took beyond the program's own."""
    engine = KeepingEngine()

    def run(out: Path, count: int) -> int:
        return (
            JobRunner(
                out,
                PictureRows(count),
                lambda: engine,
                StandInEncoding(),
                JobDescription({}),
                JobOptions(in_flight=1000, max_prepared_bytes=max_prepared_bytes),
            )
            .run()
            .counts.rows
        )

    run(out.with_name("first.jsonl"), 1)
    begin = peak()
    rows = run(out, num_rows)
    print(json.dumps({"rows": rows, "grown": peak() - begin, "kept": engine.most_bytes}))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
