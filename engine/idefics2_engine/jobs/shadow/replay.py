"""Answered rows, computed once more on the engine's operations and on the reference's."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.errors import (
    ConfigError,
    Idefics2Error,
    InternalError,
    RequestFailedError,
)
from idefics2_engine.outputs import RequestMetrics, RequestOutput, failed_output
from idefics2_engine.row import Row
from idefics2_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from idefics2_engine.llm import LLM
    from idefics2_engine.model.idefics2 import Idefics2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AnsweredRow(Row):
    """A row that was answered, with the token ids of its answers."""

    answers: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ReplayedOutput(RequestOutput):
    """The output of a row that was replayed: the agreement of its tokens, and no text."""

    agreement: TokenAgreement | None = None


@runtime_checkable
class ReplayEngine(Protocol):
    """An engine that replays rows by itself, as a pool of workers does."""

    def replay(self, rows: Iterable[AnsweredRow]) -> Iterator[RequestOutput]:
        """Yield a ``ReplayedOutput`` of each row, or an output with its error."""


def replay_rows(engine: object, rows: Iterable[AnsweredRow]) -> Iterator[RequestOutput]:
    """Compare ``engine`` with the reference on the tokens of ``rows``.

    The engine must have no rows in flight, so that its memory is free.

    Returns:
        An iterator of outputs, as of ``ReplayEngine.replay``. ``request_id`` is the row's place.

    Raises:
        ConfigError: The engine has no model.
    """
    if isinstance(engine, ReplayEngine):
        return engine.replay(rows)
    from idefics2_engine.llm import LLM

    if not isinstance(engine, LLM):
        raise ConfigError(
            f"rows must be replayed by LLM or by an engine with replay, got {type(engine).__name__}"
        )
    return _replay(engine, rows)


def _replay(llm: "LLM", rows: Iterable[AnsweredRow]) -> Iterator[RequestOutput]:
    import torch

    from idefics2_kernels import REFERENCE

    reference = llm.model.with_ops(REFERENCE)
    for place, row in enumerate(rows):
        error: Idefics2Error
        try:
            agreement = _agreement(llm, reference, row)
        except Idefics2Error as raised:
            error = raised
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            error = RequestFailedError("the reference needs more memory than there is")
        except Exception as raised:
            _logger.exception("the row with the key %r cannot be compared", row.key)
            error = InternalError(f"the row cannot be compared, got {type(raised).__name__}")
        else:
            yield _output(place, row, agreement)
            continue
        yield failed_output(str(place), error, row.key)


def _agreement(llm: "LLM", reference: "Idefics2", row: AnsweredRow) -> TokenAgreement:
    from idefics2_engine.agreement.answer_comparison import compare_answers
    from idefics2_engine.scheduling.sampling_columns import edits_logits

    builder = llm.request_builder
    request = builder.build_row(builder.read_row(row, SamplingParams()), "0", llm.images.job())
    never = builder.generation.bad_words_ids
    is_edited = edits_logits(request) or request.params.min_tokens > 0
    return compare_answers(
        (llm.model, reference),
        request.prompt_token_ids,
        request.tiles,
        row.answers,
        image_config=llm.processor.image_config,
        is_greedy=(
            request.params.temperature == 0
            and not is_edited
            and all(len(word) == 1 for word in never)
        ),
        barred=[token for word in never for token in word],
    )


def _output(place: int, row: AnsweredRow, agreement: TokenAgreement) -> ReplayedOutput:
    now = time.monotonic()
    return ReplayedOutput(
        request_id=str(place),
        prompt="",
        prompt_token_ids=[],
        prompt_logprobs=None,
        outputs=[],
        finished=True,
        metrics=RequestMetrics(now, None, now),
        num_cached_tokens=0,
        key=row.key,
        agreement=agreement,
    )
