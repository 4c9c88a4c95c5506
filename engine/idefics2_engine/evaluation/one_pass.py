"""All requests of a harness in one pass over the model, with results in their order."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from PIL import Image

from idefics2_engine.errors import Idefics2Error, ImageError
from idefics2_engine.llm import LLM
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Conversation, Prompt, Row
from idefics2_engine.sampling_params import SamplingParams

_logger = logging.getLogger(__name__)

# What Pillow raises about a file that a task opens itself. Anything else is an error of the task
_BAD_PICTURE = (OSError, SyntaxError, Image.DecompressionBombError)

Question = tuple[Prompt | Conversation, SamplingParams]
"""What a harness asks, ready for the model."""


def answer_all(
    llm: LLM,
    makers: Sequence[Callable[[], Question | None]],
    name: Callable[[int], str],
    finished: Callable[[int, RequestOutput], None] = lambda _index, _output: None,
) -> list[RequestOutput | None]:
    """Answer what ``makers`` return, in one pass; the log has a warning for each without an answer.

    Args:
        llm: The model.
        makers: Functions that return a question, or ``None`` if there is none. Threads call them
            shortly before their turn, so that not all pictures are in memory. If one cannot open
            its picture, its output has an ``ImageError``.
        name: Names the request of an index in the log.
        finished: Called with index and output as soon as the output is there.

    Returns:
        An output or ``None`` for each maker, in order. An output without an answer has an
        ``error``.

    Raises:
        Exception: A maker raised it, and it is not about a picture.
    """
    outputs: list[RequestOutput | None] = [None] * len(makers)
    rows = _Rows(makers, llm.images.num_threads)
    failed = 0
    for output in llm.iterate(rows, progress=True):
        assert isinstance(output.key, int)
        index = output.key
        if index in rows.unread:
            output = replace(output, error=rows.unread[index])
        if output.error is not None:
            failed += 1
            _logger.warning("%s has no answer: %s", name(index), output.error)
        outputs[index] = output
        finished(index, output)
    if failed:
        _logger.warning("%d of %d requests have no answer", failed, len(makers))
    return outputs


class _Rows:
    """The rows that makers return, with a length for the progress bar.

    Attributes:
        unread: Errors of rows whose pictures could not be opened. These rows have no messages.
    """

    def __init__(self, makers: Sequence[Callable[[], Question | None]], threads: int) -> None:
        self.unread: dict[int, Idefics2Error] = {}
        self._makers = makers
        self._threads = threads

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[Row]:
        for index, future in enumerate(self._made_ahead()):
            try:
                question = future.result()
            except _BAD_PICTURE as error:
                self.unread[index] = ImageError(f"{type(error).__name__}: {error}")
                question = [], SamplingParams()
            if question is not None:
                yield Row(index, *question)

    def _made_ahead(self) -> Iterator[Future[Question | None]]:
        """Yield a future of each maker in order, while the next ones run."""
        with ThreadPoolExecutor(self._threads) as pool:
            running: deque[Future[Question | None]] = deque()
            for make in self._makers:
                running.append(pool.submit(make))
                if len(running) > self._threads:
                    yield running.popleft()
            yield from running
