"""A runner's job with a stand-in for the model, whose answer is a hash of its row. Without torch."""

import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from idefics2_engine.errors import Idefics2Error, RequestFailedError
from idefics2_engine.jobs.job_options import JobOptions
from idefics2_engine.jobs.job_result import JobResult
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.store.input_files import identify_inputs
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.writers.output_file import JsonlFormat
from idefics2_engine.outputs import CompletionOutput, RequestOutput, failed_output
from idefics2_engine.row import Row

BAD = RowError("schema", "parse", "must be an object, got a list")
ROWS = [f"{'bad' if n % 7 == 3 else 'row'} {n}" for n in range(60)]
GOOD = [text for text in ROWS if text.startswith("row")]


def row_key(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def is_bad(text: str) -> bool:
    return text.startswith("bad")


def answer_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] + " é\n"


def encoded(number: int, id: str | int, text: str | None, error: RowError | None = None) -> bytes:
    outputs = [] if text is None else [{"text": text}]
    usage = None if text is None else {"prompt_tokens": 3, "images": 1, "completion_tokens": 2}
    return encode_row(
        {
            "id": id,
            "row": number,
            "outputs": outputs,
            "usage": usage,
            "error": error and error._asdict(),
        }
    )


def expected(texts: Sequence[str], errors: Mapping[str, str] | None = None) -> bytes:
    """Return the output; ``errors`` are codes of answers by the row's text."""
    lines = []
    for number, text in enumerate(texts):
        error = BAD if is_bad(text) else None
        if code := (errors or {}).get(text):
            error = RowError(code, "engine", "failed")
        answer = None if error else answer_text(text)
        lines.append(encoded(number, f"row-{number}", answer, error) + b"\n")
    return b"".join(lines)


class StandInRows:
    """Rows of texts. A text that begins with ``bad`` is a bad row."""

    can_skip = True

    def __init__(self, texts: Iterable[str], files: tuple[Path, ...] = ()) -> None:
        self.texts = texts
        self.files = files
        self.num_read = 0

    def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
        for index, text in enumerate(self.texts):
            if index < begin:
                continue
            self.num_read += 1
            bad = is_bad(text)
            yield JobRow(
                index=index,
                number=index,
                id=f"row-{index}",
                key=row_key(text),
                place=f"line {index + 1}",
                prompt=None if bad else text,
                error=BAD if bad else None,
            )


class StandInEncoding:
    make_format = JsonlFormat

    def answer(self, row: JobRow, output: RequestOutput) -> bytes:
        return encoded(row.number, row.id, output.outputs[0].text)

    def error(self, row: JobRow, error: RowError) -> bytes:
        return encoded(row.number, row.id, None, error)

    def error_of(self, error: Idefics2Error) -> RowError:
        return RowError(error.code, "engine", str(error))


class FailureError(RequestFailedError):
    """An error with a code of the test's choice."""

    def __init__(self, code: str) -> None:
        super().__init__("failed")
        self.code = code  # type: ignore[misc]


def answered(row: Row, request_id: int) -> RequestOutput:
    text = answer_text(str(row.prompt))
    answer = CompletionOutput(0, text, [1, 2], None, None, "stop", None)
    return _output(failed_output(str(request_id), FailureError("none"), row.key), answer)


def _output(blank: RequestOutput, answer: CompletionOutput) -> RequestOutput:
    return replace(blank, outputs=[answer], error=None)


class StandInEngine:
    """Answers rows in a random order, and fails as told. It is its own context.

    Args:
        seed: Of the order.
        failures: By the text of a row, codes of its first answers; then it is answered.
        held: By the text of a row, answers to other rows that come before its own.
        on_answer: Called before each answer with the number of answers so far.

    Attributes:
        asked: How often each text was read.
        loads: How often the context was entered.
        most_in_flight: Most rows that were read and not answered.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        failures: Mapping[str, Sequence[str]] | None = None,
        held: Mapping[str, int] | None = None,
        on_answer: Callable[[int], None] = lambda _number: None,
        on_row: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.rng = random.Random(seed)
        self.failures = dict(failures or {})
        self.held = dict(held or {})
        self.on_answer = on_answer
        self.on_row = on_row
        self.asked: Counter[str] = Counter()
        self.loads = 0
        self.most_in_flight = 0
        self.answers: StandInAnswers | None = None
        self.fails_to_load: Exception | None = None

    def __call__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        self.loads += 1
        if self.fails_to_load is not None:
            raise self.fails_to_load
        return self

    def __exit__(self, *_error: object) -> None:
        if self.answers is not None:
            self.answers.drain()
            self.answers.events.put(RuntimeError("the engine was closed"))

    def iterate(
        self,
        prompts: Iterable[Row],
        *,
        in_flight: int | None = None,
        max_prepared_bytes: int = 0,
    ) -> "StandInAnswers":
        assert in_flight is not None
        self.answers = StandInAnswers(self, prompts, in_flight)
        return self.answers


class StandInAnswers(Iterator[RequestOutput]):
    def __init__(self, engine: StandInEngine, rows: Iterable[Row], in_flight: int) -> None:
        self.engine = engine
        self.rows = iter(rows)
        self.room = threading.Semaphore(in_flight)
        self.events: SimpleQueue[Row | BaseException | None] = SimpleQueue()
        self.ready: list[Row] = []
        self.is_over = False
        self.error: BaseException | None = None
        self.is_drained = False
        self.count = 0
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        try:
            while True:
                self.room.acquire()
                row = next(self.rows, None)
                if row is None or self.is_drained:
                    break
                self.events.put(row)
        except BaseException as error:
            self.error = error
        self.events.put(None)

    def drain(self) -> None:
        self.is_drained = True
        self.room.release()
        self.events.put(None)

    def close(self) -> None:
        self.is_over = True

    def __next__(self) -> RequestOutput:
        while True:
            free = [row for row in self.ready if self.engine.held.get(str(row.prompt), 0) <= 0]
            if free and self.events.empty():
                break
            if self.is_over and not free and self.ready and self.events.empty():
                free = self.ready
                break
            if self.is_over and not self.ready:
                raise self.error or StopIteration
            self.take(self.events.get())
        row = self.engine.rng.choice(free)
        self.ready.remove(row)
        self.engine.on_answer(self.count)
        self.count += 1
        for text in self.engine.held:
            self.engine.held[text] -= 1
        self.room.release()
        text = str(row.prompt)
        failures = self.engine.failures.get(text, ())
        attempt = self.engine.asked[text] - 1
        if 0 <= attempt < len(failures):
            return failed_output(str(self.count), FailureError(failures[attempt]), row.key)
        return answered(row, self.count)

    def take(self, event: Row | BaseException | None) -> None:
        if isinstance(event, BaseException):
            raise event
        if event is None:
            self.is_over = True
            return
        self.ready.append(event)
        self.engine.most_in_flight = max(self.engine.most_in_flight, len(self.ready))
        self.engine.asked[str(event.prompt)] += 1
        self.engine.on_row(str(event.prompt))


def runner(out: Path, engine: StandInEngine, texts: Any = ROWS, **options: Any) -> JobRunner:
    """Return a runner of ``texts``, or of rows that a test holds."""
    return JobRunner(
        out,
        texts if isinstance(texts, StandInRows) else StandInRows(texts),
        engine,
        StandInEncoding(),
        JobDescription({}),
        JobOptions(**{"in_flight": 4} | options),
    )


def run_rows(
    out: Path,
    texts: Iterable[str],
    engine: StandInEngine | None = None,
    *,
    parts: dict[str, Any] | None = None,
    source: Path | None = None,
    runner_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> JobResult:
    """Run or resume a job of ``texts``, which are said to be in the file ``source``."""
    files = () if source is None else (source,)
    options = {"in_flight": 4} | options
    return JobRunner(
        out,
        StandInRows(texts, files),
        engine or StandInEngine(),
        StandInEncoding(),
        JobDescription(parts or {}, identify_inputs(files)),
        JobOptions(**options),
        **(runner_options or {}),
    ).run()


def read_with(texts: list[str], place: int, call: Any) -> Iterator[str]:
    """Yield texts; ``call`` is called in front of the one at ``place``."""
    for index, text in enumerate(texts):
        if index == place:
            call()
        yield text


def void(_value: object) -> None:
    """Drop a value, for a lambda without one."""
