"""Conversion of prompts, conversations and parameters to requests for the engine."""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from idefics2_engine.caller_errors import about, caller_code
from idefics2_engine.errors import (
    Idefics2Error,
    InternalError,
    PromptError,
    PromptTooLongError,
    SamplingError,
    TooManyImagesError,
    short_repr,
)
from idefics2_engine.images.loader import ImageSource
from idefics2_engine.images.reader import ImageJob, ImageReader
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import (
    ProcessedPrompt,
    Processor,
    PromptDraft,
    RenderedChat,
)
from idefics2_engine.row import Conversation, Prompt, Row, row_seed
from idefics2_engine.sampling.bad_words import bad_words_ids, check_choice
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling.logprob_bounds import check_entries
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.placeholders import image_items
from idefics2_engine.scheduling.sequence import Request
from idefics2_engine.structured.compiler import Compiler, Constraint

_logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class RowDraft:
    """A copy of one row, which shares no object with the caller.

    Attributes:
        prompt: The prompt, its images not yet decoded.
        params: The row's sampling parameters.
        seed: Used if ``params`` have no seed.
        key: The caller's key of the row. None if it has none.
    """

    prompt: PromptDraft
    params: SamplingParams
    seed: int
    key: str | int | None


class _OpenedRow(NamedTuple):
    """A row whose conversation has no tokens yet, and its parameters as they were given."""

    prompt: RenderedChat | PromptDraft
    params: object
    seed: int
    key: str | int | None


class RequestBuilder:
    """A thread-safe reader of prompts and builder of requests.

    Args:
        processor: Converts text and images to token ids and tiles.
        config: Configuration of the model.
        generation: End tokens and bad words of the checkpoint.
        max_model_len: Most tokens of a prompt and its answer together.
        seed: Determines the seeds of requests that have none: that of a row with its key or
            place, others in the order in which they are built.
        reader: Reads images. If ``None``, one without worker processes.
    """

    def __init__(
        self,
        processor: Processor,
        config: ModelConfig,
        generation: GenerationConfig,
        max_model_len: int,
        seed: int,
        reader: ImageReader | None = None,
    ) -> None:
        self.processor = processor
        self.reader = reader or processor.image_reader()
        self.config = config
        self.generation = generation
        self.max_model_len = max_model_len
        self._seed = seed
        self._seeds = random.Random(seed)
        self._ids = itertools.count()
        # Rows of a job often share their parameters, which are checked once
        self._last_checked: tuple[SamplingParams | None, tuple[tuple[int, ...], ...]] = (None, ())
        self._compiler = Compiler(
            processor.tokenizer, config.text.vocab_size, generation.eos_token_ids
        )
        # The last constraint whose answers ``max_tokens`` may cut off
        self._warned: Constraint | None = None

    def draw_seed(self) -> int:
        """Draw the seed of a request that has none."""
        return self._seeds.getrandbits(63)

    def read_prompt(self, prompt: Prompt) -> PromptDraft:
        """Read a raw prompt without decoding its images.

        Raises:
            PromptError: The prompt is malformed, or its text does not fit its images.
        """
        if isinstance(prompt, str):
            return self.processor.draft_prompt(prompt)
        if not isinstance(prompt, Mapping):
            raise PromptError(f"prompt must be text or a mapping, got {type(prompt).__name__}")
        unknown = prompt.keys() - {"prompt", "prompt_token_ids", "multi_modal_data"}
        given = prompt.keys() & {"prompt", "prompt_token_ids"}
        if unknown or len(given) != 1:
            raise PromptError(
                "prompt must have 'prompt' or 'prompt_token_ids', and may have 'multi_modal_data', "
                f"got {short_repr(sorted(map(str, prompt)))}{_advice(prompt)}"
            )
        media = prompt.get("multi_modal_data") or {}
        if not isinstance(media, Mapping) or media.keys() - {"image"}:
            raise PromptError(f"multi_modal_data must be {{'image': …}}, got {short_repr(media)}")
        images = media.get("image", [])
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if "prompt" in prompt:
            return self.processor.draft_prompt(prompt["prompt"], images)
        return self.processor.draft_token_prompt(prompt["prompt_token_ids"], images)

    def read(self, prompt: Prompt | Conversation) -> PromptDraft:
        """Read a raw prompt or a conversation without decoding its images.

        Raises:
            PromptError: The prompt is malformed, or its text does not fit its images.
        """
        if is_conversation(prompt):
            return self.processor.draft_chat(cast(Conversation, prompt))
        return self.read_prompt(cast(Prompt, prompt))

    def read_prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[PromptDraft]:
        """Read one raw prompt or several, naming the prompt in errors if there are several."""
        several = [prompts] if isinstance(prompts, (str, Mapping)) else _listed("prompts", prompts)
        drafts = []
        for index, prompt in enumerate(several):
            with about(f"prompts[{index}]" if len(several) > 1 else None):
                drafts.append(self.read_prompt(prompt))
        return drafts

    def read_conversations(
        self,
        messages: Conversation | Sequence[Conversation],
        images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]],
    ) -> list[PromptDraft]:
        """Read one conversation or several without decoding their images.

        Args:
            messages: One conversation or several.
            images: Images for the image parts without a source, in order. For several
                conversations, a list for each.

        Raises:
            PromptError: A conversation is malformed, or the model has no chat template.
        """
        if isinstance(messages, (str, Mapping)):
            raise PromptError(
                f"messages must be a list of messages or of conversations, got {type(messages).__name__}"
            )
        if is_conversation(messages):
            several, of_each = [cast(Conversation, messages)], [cast(Sequence[ImageSource], images)]
        else:
            several = _listed("messages", messages)
            of_each = _listed("images", images) or [()] * len(several)
            if len(of_each) != len(several):
                raise PromptError(
                    f"images must be a list for each of the {len(several)} conversations, "
                    f"got {len(of_each)}"
                )
        return [
            self.processor.draft_chat(
                one, own, name=f"messages[{index}]" if len(several) > 1 else "messages"
            )
            for index, (one, own) in enumerate(zip(several, of_each, strict=True))
        ]

    def read_row(self, row: object, shared: SamplingParams, index: int | None = None) -> RowDraft:
        """Read a prompt or a conversation with its own parameters or the ``shared`` ones.

        Args:
            row: A prompt, a conversation, a pair of one and its parameters, or a ``Row``.
            shared: Parameters of a row that has none of its own.
            index: The row's place in a job, which determines its seed if it has no key. If
                ``None``, the seed of such a row is drawn.

        Raises:
            Idefics2Error: The row is malformed, or reading it raised any exception, which is
                chained.
        """
        return self._read_opened(self._open_row(row, shared, index))

    def read_rows(
        self, rows: Iterable[tuple[object, int]], shared: SamplingParams
    ) -> list[RowDraft | Exception]:
        """Read rows with their places like ``read_row``; return the error of a row in its place.

        All conversations are rendered, then all are tokenized, which takes less time.
        """
        opened = [_caught(self._open_row, row, shared, index) for row, index in rows]
        self.processor.prepare_chats(
            one.prompt
            for one in opened
            if isinstance(one, _OpenedRow) and isinstance(one.prompt, RenderedChat)
        )
        return [
            one if isinstance(one, Exception) else _caught(self._read_opened, one) for one in opened
        ]

    def _open_row(self, row: object, shared: SamplingParams, index: int | None) -> "_OpenedRow":
        """Do the part of ``read_row`` before the tokens."""
        key = row_key(row)
        place = index if key is None else key
        seed = self.draw_seed() if place is None else row_seed(self._seed, place)
        with caller_code("row", PromptError):
            prompt, params = row, cast(object, shared)
            if isinstance(row, Row):
                prompt = row.prompt
                params = shared if row.sampling_params is None else row.sampling_params
            elif isinstance(row, tuple) and not is_conversation(row):
                if len(row) != 2:
                    raise PromptError(
                        "row: a tuple must be a prompt and its SamplingParams, "
                        f"got {len(row)} elements"
                    )
                prompt, params = row
            if is_conversation(prompt):
                opened = self.processor.render_chat(cast(Conversation, prompt))
                return _OpenedRow(opened, params, seed, key)
            return _OpenedRow(self.read_prompt(cast(Prompt, prompt)), params, seed, key)

    def _read_opened(self, opened: "_OpenedRow") -> RowDraft:
        """Do the rest of ``read_row``."""
        prompt, params, seed, key = opened
        with caller_code("row", PromptError):
            if isinstance(prompt, RenderedChat):
                prompt = self.processor.encode_chat(prompt)
            return RowDraft(prompt.owned(), read_params(params), seed, key)

    def finish(self, drafts: Sequence[PromptDraft], name: str = "prompts") -> list[ProcessedPrompt]:
        """Read the images of ``drafts``, which errors call ``name``.

        Raises:
            ImageError: An image cannot be read; the message says which, if there are several.
        """
        job = self.reader.job(sum(len(draft.images) for draft in drafts))
        return self.processor.finish(drafts, name, job)

    def build_row(self, row: RowDraft, request_id: str | None, job: ImageJob) -> Request:
        """Decode the images of ``row`` and build its request.

        Args:
            row: The row.
            request_id: Identifier. If ``None``, the count of requests numbered before.
            job: The job that the row belongs to.

        Raises:
            Idefics2Error: An image cannot be read, or the request does not fit the model.
        """
        begin = time.perf_counter()
        # The images of such a row may be too many to hold, so they are not read
        self._check_length(row.prompt.token_ids, len(row.prompt.images))
        (prompt,) = self.processor.finish([row.prompt], job=job)
        request = self.build(prompt, row.params, request_id=request_id, seed=row.seed)
        request.key = row.key
        request.prepare_seconds = time.perf_counter() - begin
        return request

    def build(
        self,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        seed: int | None = None,
    ) -> Request:
        """Build the request of one prompt.

        Args:
            prompt: Token ids and tiles.
            params: Sampling parameters. Their seed has precedence over ``seed``.
            request_id: Identifier. If ``None``, the count of requests numbered before.
            seed: Seed if ``params`` have none. If ``None``, one is drawn.

        Raises:
            PromptError: The prompt is empty or too long, or its images are too many.
            SamplingError: A parameter does not fit the model.
        """
        if not prompt.token_ids:
            raise PromptError("prompt must have at least one token, got none")
        self._check_length(prompt.token_ids, len(prompt.image_info))
        room = self.max_model_len - len(prompt.token_ids)
        bad_words = self._bad_words(params)
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        if params.min_tokens > max_tokens:
            raise SamplingError(
                f"min_tokens must be at most the {room} tokens that the prompt leaves of "
                f"{self.max_model_len}, got {short_repr(params.min_tokens)}"
            )
        if params.prompt_logprobs_start >= len(prompt.token_ids):
            raise SamplingError(
                f"prompt_logprobs_start must be below the prompt's {len(prompt.token_ids)} tokens, "
                f"got {short_repr(params.prompt_logprobs_start)}"
            )
        check_entries(params, len(prompt.token_ids), max_tokens, self.config.text.vocab_size)
        constraint = self._constraint(params, prompt, max_tokens)
        # A seed is drawn even if the request has its own, so that the seeds of other requests do
        # not depend on it
        drawn = self.draw_seed() if seed is None else seed
        return Request(
            request_id=str(next(self._ids)) if request_id is None else request_id,
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids,
            images=image_items(
                prompt.token_ids,
                prompt.tiles,
                self.config.image_token_id,
                self.config.perceiver.num_latents,
            ),
            params=params,
            seed=drawn if params.seed is None else params.seed,
            max_tokens=max_tokens,
            bad_words_ids=bad_words,
            constraint=constraint,
            image_info=prompt.image_info,
        )

    def build_all(
        self,
        prompts: Sequence[ProcessedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """Build a request for each prompt with shared parameters or one object for each.

        Raises:
            PromptError: The number of parameters differs from that of prompts, or a prompt is empty
                or too long.
            SamplingError: A parameter does not fit the model.
        """
        if isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str):
            params = [read_params(one) for one in sampling_params]
        else:
            params = [read_params(sampling_params)] * len(prompts)
        if len(params) != len(prompts):
            raise PromptError(
                f"sampling_params must be one or as many as the {len(prompts)} prompts, got {len(params)}"
            )
        return [self.build(*pair) for pair in zip(prompts, params, strict=True)]

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of bad words; check all that does not depend on the prompt."""
        known, bad_words = self._last_checked
        if params is known:
            return bad_words
        vocab_size = self.config.text.vocab_size
        params.check_vocabulary(vocab_size)
        bad_words = bad_words_ids(params.bad_words, self.processor.tokenizer)
        words = (*self.generation.bad_words_ids, *bad_words)
        check_choice(params, words, self.generation.eos_token_ids, vocab_size)
        # A caller could change a dict
        if params.logit_bias is None:
            self._last_checked = params, bad_words
        return bad_words

    def _constraint(
        self, params: SamplingParams, prompt: ProcessedPrompt, max_tokens: int
    ) -> Constraint | None:
        """Compile the constraint of ``params``, if there is one."""
        if params.constraint is None:
            return None
        # An answer begins with a space that its text has not, unless it goes on with a word
        spaced = not prompt.prompt[-1:].isalnum()
        constraint = self._compiler.constraint(params.constraint, spaced=spaced)
        if constraint.fewest_tokens > max_tokens and constraint is not self._warned:
            self._warned = constraint
            _logger.warning("%s", too_few_tokens(constraint.fewest_tokens, max_tokens))
        return constraint

    def _check_length(self, token_ids: Sequence[int], num_images: int) -> None:
        """Raise ``PromptTooLongError`` if a prompt leaves no room for an answer."""
        if len(token_ids) < self.max_model_len:
            return
        if token_ids.count(self.config.image_token_id) >= self.max_model_len:
            raise TooManyImagesError(len(token_ids), self.max_model_len, num_images)
        raise PromptTooLongError(len(token_ids), self.max_model_len)


def too_few_tokens(fewest: int, max_tokens: int) -> str:
    """Say that ``max_tokens`` may cut off every answer that satisfies a constraint."""
    return (
        f"max_tokens should be at least the {fewest} tokens or so of a short answer that satisfies "
        f"structured_outputs, got {max_tokens}"
    )


def read_params(params: object) -> SamplingParams:
    """Return ``params``, or the default parameters for ``None``.

    Raises:
        SamplingError: ``params`` are of another type.
    """
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise SamplingError(f"sampling_params must be SamplingParams, got {short_repr(params)}")
    return params


def row_key(row: object) -> str | int | None:
    """Return the caller's key of ``row``, ``None`` if it has none."""
    return row.key if isinstance(row, Row) else None


def is_conversation(value: object) -> bool:
    """Return whether ``value`` is one conversation: a non-empty sequence of mappings."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )


def row_error(error: BaseException) -> Idefics2Error:
    """Return ``error`` if it is an ``Idefics2Error``, else an ``InternalError`` caused by it."""
    if isinstance(error, Idefics2Error):
        return error
    internal = InternalError(f"prompt: could not be prepared, got {type(error).__name__}")
    internal.__cause__ = error
    return internal


def _caught(function: Callable[..., Result], *arguments: object) -> Result | Exception:
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _listed(name: str, values: Any) -> list[Any]:
    """Convert ``values`` to a list; raise ``PromptError`` if they are not iterable."""
    if not isinstance(values, Iterable):
        raise PromptError(f"{name} must be one or a list of them, got {type(values).__name__}")
    return list(values)


def _advice(prompt: Mapping[str, Any]) -> str:
    """Return advice for a mapping that holds a conversation in an unsupported format."""
    if "role" in prompt:
        return "; this is one message, and a conversation is a list of messages"
    if "messages" in prompt:
        return "; pass a conversation as its list of messages, without a mapping around it"
    return ""
