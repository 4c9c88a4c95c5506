"""Requests and their sequences: tokens, text, status and stop rules; host only."""

import time
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.tiling import Tile
from idefics2_engine.outputs import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from idefics2_engine.prompts.detokenizer import Detokenizer
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.placeholders import ImageItem, items_between
from idefics2_engine.scheduling.sequence_table import SequenceTable
from idefics2_engine.structured.compiler import Constraint
from idefics2_engine.structured.matcher import Matcher
from idefics2_engine.structured.parsing import parse_answer


@dataclass(eq=False)
class Request:
    """A prompt with its parameters, and the ``n`` sequences that answer it.

    Attributes:
        request_id: Identifier of the request.
        prompt: Text of the prompt.
        prompt_token_ids: Token ids of the prompt.
        images: Tiles in the order of their placeholders.
        params: Sampling parameters.
        seed: Seed of the first sequence. Each further sequence adds one.
        max_tokens: Most generated tokens of each sequence, within the model's length.
        bad_words_ids: Token ids of ``params.bad_words``.
        constraint: The compiled ``params.structured_outputs``. None if there are none.
        key: The caller's key of the row. None if it has none.
        image_info: What is known of each image of the prompt, in order.
        prompt_logprobs: Log probabilities of prompt tokens, from the second token. None for tokens
            before ``params.prompt_logprobs_start``.
        arrival_time: Time of ``time.monotonic``, in seconds.
        every_token: Whether the engine reports the request after every token, not only at its end.
        may_wait: Whether the request may be held back and overtaken, because its caller reads no
            output before the end.
        prepare_seconds: Time in which a thread prepared the request for ``iterate`` or ``submit``.
        sequences: The answers.
        num_started: Sequences that have been queued or forked.
        num_cached_tokens: Prompt tokens found in the cache at first admission.
        error: Set by the engine if the request failed.
    """

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    images: Items[ImageItem]
    params: SamplingParams
    seed: int
    max_tokens: int
    bad_words_ids: Items[tuple[int, ...]] = ()
    constraint: Constraint | None = None
    key: str | int | None = None
    image_info: tuple[ImageInfo, ...] = ()
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False)
    arrival_time: float = field(default_factory=time.monotonic)
    every_token: bool = False
    may_wait: bool = False
    prepare_seconds: float = 0.0
    sequences: "list[Sequence]" = field(default_factory=list)
    num_started: int = 0
    num_cached_tokens: int | None = None
    error: Idefics2Error | None = None

    def __post_init__(self) -> None:
        """Begin with the tokens that need no log probability."""
        # The list has no place for the first token of the prompt
        self.prompt_logprobs = [None] * (self.params.prompt_logprobs_start - 1)

    @property
    def tiles(self) -> list[Tile]:
        """Tiles in the order of their placeholders, without pictures that came in patches."""
        return [image.tile for image in self.images if isinstance(image.tile, Tile)]

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended or the request has failed."""
        return self.error is not None or all(s.finish_reason for s in self.sequences)

    def output(self) -> RequestOutput:
        """Return the request with its answers so far."""
        first = [s.first_token_time for s in self.sequences if s.first_token_time is not None]
        last = [s.finished_time for s in self.sequences if s.finished_time is not None]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            prompt_logprobs=(
                None
                if self.params.prompt_logprobs is None
                else [None, *(known and dict(known) for known in self.prompt_logprobs)]
            ),
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                first_token_time=min(first, default=None),
                finished_time=max(last, default=None) if self.finished else None,
            ),
            num_cached_tokens=self.num_cached_tokens or 0,
            error=self.error,
            key=self.key,
            num_image_tokens=sum(image.end - image.begin for image in self.images),
            num_patches=sum(image.tile.num_patches for image in self.images),
            image_info=self.image_info,
        )


def add_page_names(
    names: list[bytes], token_ids: list[int], images: Items[ImageItem], page_size: int
) -> None:
    """Add the names of the full pages of ``token_ids`` that ``names`` lacks."""
    for begin in range(len(names) * page_size, len(token_ids) - page_size + 1, page_size):
        end = begin + page_size
        named = [names[-1] if begin else b"", array("q", token_ids[begin:end]).tobytes()]
        for item in items_between(images, begin, end):
            place = item.begin - begin
            named += item.tile.fingerprint, place.to_bytes(8, "little", signed=True)
        names.append(blake2b(b"".join(named), digest_size=16).digest())


class Sequence:
    """One answer: tokens of the prompt, generated tokens, and the rules that end it.

    While it runs, a row of the scheduler's ``SequenceTable`` has its numbers and pages.

    Attributes:
        table: The table. None if the sequence does not run.
        row: The row.
    """

    def __init__(
        self, request: Request, index: int, eos_token_ids: frozenset[int], detokenizer: Detokenizer
    ) -> None:
        self.request = request
        self.index = index
        self.table: SequenceTable | None = None
        self.row = -1
        # The scheduler sets the images held
        self.held_images: list[ImageItem] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.first_token_time: float | None = None
        self.finished_time: float | None = None
        # One entry for each generated token, if log probabilities were requested
        self.logprobs: list[TokenLogprobs] = []
        # Without the row's recent tokens
        self._token_ids = list(request.prompt_token_ids)
        # The row has the number while there is one
        self._num_pending = 0
        self._page_names: list[bytes] = []
        self._eos_token_ids = eos_token_ids
        self._detokenizer = detokenizer
        self._text = ""
        # Generated tokens whose text is in _text
        self._num_detokenized = 0
        # Whether the last token ended the answer and is not part of the text
        self._end_is_hidden = False
        self._text_is_whole = False

    @property
    def token_ids(self) -> list[int]:
        """Known tokens of prompt and answer."""
        if self.table is not None:
            self._token_ids += self.table.take_recent(self.row)
        return self._token_ids

    def known_tokens(self) -> list[int]:
        """Return a copy of ``token_ids``, and leave recent tokens in the row."""
        return self._token_ids + ([] if self.table is None else self.table.recent(self.row))

    @property
    def num_pending(self) -> int:
        """Tokens drawn on the device that the host has not read yet."""
        return self._num_pending if self.table is None else int(self.table.num_pending[self.row])

    @num_pending.setter
    def num_pending(self, count: int) -> None:
        if self.table is None:
            self._num_pending = count
        else:
            self.table.num_pending[self.row] = count

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the KV cache or will be before they are read."""
        return 0 if self.table is None else int(self.table.num_computed[self.row])

    @property
    def pages(self) -> list[int]:
        """Pages of the KV cache."""
        return [] if self.table is None else self.table.row_pages(self.row)

    @property
    def asks(self) -> bool:
        """Whether each token is more than a number for this sequence."""
        params = self.request.params
        return (
            bool(params.stop)
            or params.logprobs is not None
            or self.request.every_token
            or self.request.constraint is not None
        )

    @cached_property
    def matcher(self) -> Matcher | None:
        """How far the answer has satisfied the request's constraint, if there is one."""
        constraint = self.request.constraint
        return None if constraint is None else constraint.matcher()

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_drawn(self) -> int:
        """Tokens after the prompt, including pending ones."""
        return self.num_generated + self.num_pending

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, including pending ones."""
        return len(self.token_ids) + self.num_pending

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer."""
        return len(self.request.prompt_token_ids) + self.request.max_tokens

    @property
    def seed(self) -> int:
        """Seed of the sequence's random stream, wrapped to int64."""
        return (self.request.seed + self.index + 2**63) % 2**64 - 2**63

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt log probabilities remain to be computed by this, the first, sequence."""
        request = self.request
        wanted = 0 if request.params.prompt_logprobs is None else len(request.prompt_token_ids) - 1
        return self.index == 0 and len(request.prompt_logprobs) < wanted

    def start_running(self, table: SequenceTable, row: int) -> None:
        """Hand tokens and numbers over to ``row``, which has them already."""
        self.table, self.row = table, row

    def stop_running(self) -> None:
        """Take tokens and numbers back from the row, and give it up."""
        assert self.table is not None
        self._token_ids += self.table.take_recent(self.row)
        self._num_pending = self.num_pending
        self.table.remove(self.row)
        self.table, self.row = None, -1

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""
        eos = frozenset[int]() if self.request.params.ignore_eos else self._eos_token_ids
        return eos | frozenset(self.request.params.stop_token_ids)

    def page_names(self, page_size: int) -> list[bytes]:
        """Return a name for each full page, written or not: a chain of 128-bit hashes."""
        add_page_names(self._page_names, self.token_ids, self.request.images, page_size)
        return self._page_names

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Append a token, with ``logprobs`` if requested, and apply the stop rules.

        Raises:
            StructuredOutputError: The answer cannot satisfy its constraint.
        """
        params = self.request.params
        now = time.monotonic()
        self.first_token_time = self.first_token_time or now
        self.token_ids.append(token_id)
        if self.table is None:
            self._num_pending = max(0, self._num_pending - 1)
        else:
            self.table.append_one(self.row, token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        may_end = self.num_generated >= params.min_tokens
        if token_id in self.end_token_ids and may_end:
            self.finish_reason = "stop"
            self._end_is_hidden = not params.include_stop_str_in_output
            if token_id in params.stop_token_ids:
                self.stop_reason = token_id
        elif self._completes(token_id) and may_end:
            self.finish_reason = "stop"
        elif self.num_generated == self.request.max_tokens:
            self.finish_reason = "length"
        if params.stop:
            before = len(self._text)
            self._detokenize()
            if self.num_generated >= params.min_tokens:
                self._stop_at_string(before)
        if self.finish_reason:
            self.finished_time = now
            self.num_pending = 0

    def append_forced(self) -> int:
        """Append the tokens of the one text with which the answer can go on; return their number.

        There are none if the answer's tokens need log probabilities or may be barred: then they are
        drawn.

        Raises:
            StructuredOutputError: The answer cannot satisfy its constraint.
        """
        number, params = 0, self.request.params
        is_barred = params.allowed_token_ids is not None or bool(self.request.bad_words_ids)
        if self.matcher is None or params.logprobs is not None or is_barred:
            return number
        while self.matcher.forced and not self.finish_reason:
            self.append(self.matcher.forced[0])
            number += 1
        return number

    def _completes(self, token_id: int) -> bool:
        """Advance the matcher; return whether the answer now satisfies its constraint for good."""
        if self.matcher is None:
            return False
        self.matcher.consume(token_id)
        return self.matcher.is_complete

    @property
    def text(self) -> str:
        """The answer so far, without an incomplete character at its end."""
        self._detokenize()
        return self._text

    def _detokenize(self) -> None:
        """Detokenize the new tokens.

        Without stop strings, this happens only when the text is read.
        """
        if self._text_is_whole:
            return
        begin = len(self.request.prompt_token_ids) + self._num_detokenized
        end = len(self.token_ids) - self._end_is_hidden
        self._text += self._detokenizer.add_all(self.token_ids[begin:end])
        self._num_detokenized += max(0, end - begin)
        if self.finish_reason:
            self._text += self._detokenizer.flush()
            self._text_is_whole = True

    def _stop_at_string(self, before: int) -> None:
        """End at the first stop string completed by the text from ``before`` on."""
        found = [
            (at, stop)
            for stop in self.request.params.stop
            if (at := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            at, stop = min(found)
            kept = at + len(stop) if self.request.params.include_stop_str_in_output else at
            self._text, self._text_is_whole = self._text[:kept], True
            self.finish_reason, self.stop_reason = "stop", stop

    def output(self) -> CompletionOutput:
        """Return the answer so far, without text that may become a stop string."""
        text = self.text
        if not self.finish_reason:
            text = text[: len(text) - self._held_back()]
        tokens = self.token_ids[len(self.request.prompt_token_ids) :]
        scored = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tokens,
            cumulative_logprob=(
                sum(
                    place[token].logprob for token, place in zip(tokens, self.logprobs, strict=True)
                )
                if scored
                else None
            ),
            logprobs=[dict(place) for place in self.logprobs] if scored else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            parsed=(
                parse_answer(self.request.params.constraint, text)
                if self.finish_reason == "stop"
                else None
            ),
        )

    def _held_back(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        return max(
            (
                length
                for stop in self.request.params.stop
                for length in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )
