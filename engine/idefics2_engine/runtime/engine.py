"""The step loop: schedule a step, launch it, and land it by reading its tokens.

With ``run_ahead``, the next step is launched before the host has read the tokens of the previous
one, so the device never waits for the host. The next step reads those tokens on the device. If a
sequence had already ended, one extra step was computed for it.

A step with constrained sequences (``structured_outputs``) draws its tokens only after the previous
step has landed, because what a sequence may draw depends on its last token. Its forward pass is
launched before that, as always, so the device computes while the host reads tokens and computes
the bits of those allowed. Sequences that turn out to have ended, or whose next tokens are forced, do
not draw.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import to_device
from idefics2_engine.errors import RequestFailedError, StructuredOutputError
from idefics2_engine.images.tiling import ImageConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.prompts.detokenizer import Detokenizer
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_engine.runtime.memory_profile import memory_as_config_error
from idefics2_engine.runtime.model_runner import Runner
from idefics2_engine.runtime.stats import EngineStats
from idefics2_engine.runtime.step_clock import StepClock
from idefics2_engine.runtime.step_gate import StepGate
from idefics2_engine.runtime.warm_up import warm_up_sampling
from idefics2_engine.sampling.draw_batch import DrawBatch
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling.logprobs import TokenTexts
from idefics2_engine.sampling.sampler import NO_CHOICES, Drawn, Sampler
from idefics2_engine.sampling.token_masks import TokenMasks
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.admission import AdmissionPolicy
from idefics2_engine.scheduling.encoder_cache import EncoderCache
from idefics2_engine.scheduling.page_allocator import PageAllocator
from idefics2_engine.scheduling.scheduler import Scheduler
from idefics2_engine.scheduling.sequence import Request, Sequence
from idefics2_engine.scheduling.sequence_table import Ints
from idefics2_engine.scheduling.step import Step
from idefics2_engine.structured.compiler import Words

_logger = logging.getLogger(__name__)
_DEFAULT_MAX_TOKENS = SamplingParams().max_tokens


@dataclass(frozen=True)
class _Pass:
    """A launched forward pass whose sequences have not drawn a token.

    Attributes:
        step: The step.
        logits: (L, V) logits of the sequences that move on and of the chunks that sample.
        rows: (B,) rows of the table whose sequences draw a token.
        serials: (B,) their serial numbers.
        lengths: (B,) their tokens, pending ones included.
        places: (B,) rows of ``logits``.
        failed: Requests whose prompts cannot be scored, each with the reason.
        is_constrained: Whether what a sequence may draw depends on its last token.
    """

    step: Step
    logits: Tensor
    rows: Ints
    serials: Ints
    lengths: Ints
    places: Ints
    failed: list[tuple[Request, str]]
    is_constrained: bool


@dataclass(frozen=True)
class _Flight:
    """A launched step whose tokens the host has not read.

    Attributes:
        step: The step.
        rows: (B,) rows of the table whose sequences draw a token.
        serials: (B,) their serial numbers, by which they are known if rows changed owners.
        batch: These sequences.
        drawn: Their tokens. None if no sequence draws one.
        failed: Requests whose prompts cannot be scored, each with the reason.
    """

    step: Step
    rows: Ints
    serials: Ints
    batch: DrawBatch
    drawn: Drawn | None
    failed: list[tuple[Request, str]]


class Engine:
    """The engine that answers concurrent requests on one device.

    Raises:
        ConfigError: The KV cache or the CUDA graphs do not fit into memory.
    """

    def __init__(
        self,
        model: Idefics2,
        tokenizer: Tokenizer,
        image_config: ImageConfig,
        generation: GenerationConfig,
        config: EngineConfig,
        *,
        min_p_first: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.generation = generation
        self.config = config
        self._window = model.config.text.sliding_window
        self._has_warned_of_length = False
        self.gate = StepGate(is_used=model.device.type == "cuda")
        self.reset()
        with memory_as_config_error(config):
            kv_cache = KVCache(
                model.config.text, config.num_pages, config.page_size, model.device, model.dtype
            )
            self.runner = Runner(model, kv_cache, image_config, config, self.gate)
        self.stats = EngineStats()
        self.clock = StepClock(self.stats, model.device)
        self.sampler = Sampler(
            model.ops,
            generation.bad_words_ids,
            model.config.image_token_id,
            TokenTexts(tokenizer),
            min_p_first=min_p_first,
        )
        self.masks = TokenMasks()
        # Constraints never allow a control token, but could force any other bad word
        control_ids = tokenizer.control_ids
        self._may_force = all(control_ids & {*word} for word in generation.bad_words_ids)
        if model.device.type == "cuda":
            warm_up_sampling(model, min_p_first=min_p_first)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue ``request``, which must fit the engine's maximum length."""
        for index in range(request.params.n):
            detokenizer = Detokenizer(self.tokenizer, request.params.skip_special_tokens)
            sequence = Sequence(request, index, self.generation.eos_token_ids, detokenizer)
            request.sequences.append(sequence)
        self.stats.prepare_seconds += request.prepare_seconds
        # The other sequences are forked after the first one has computed the prompt
        self.scheduler.add(request.sequences[0])

    def reset(self) -> None:
        """Drop every request and clear the caches; valid in any state."""
        config = self.config
        self.scheduler = Scheduler(
            PageAllocator(config.num_pages, config.page_size),
            EncoderCache(config.max_cached_images),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_patches,
            self._window,
            config.prefix_caching,
            AdmissionPolicy.for_slots(config.max_num_seqs),
        )
        self._flight: _Flight | None = None
        # A forward pass of constrained sequences, which draw when the step before has landed
        self._pass: _Pass | None = None
        # Requests of a failed step that have not been in a successful step since
        self._suspects: set[Request] = set()
        # Requests that the next return of step() contains
        self._changed: dict[Request, None] = {}

    @property
    def is_ahead(self) -> bool:
        """Whether a step was launched whose tokens have not been read."""
        return self._flight is not None

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Request]:
        """Launch the next step and read tokens: with ``run_ahead``, those of the previous step.

        If a forward pass fails, only the request that caused it fails, with an ``error``. After an
        out-of-memory error, steps become smaller. After any other error, fewer sequences run at
        once until one request fails alone.

        Args:
            meanwhile: Called after the launch, before the host waits for the device.

        Returns:
            The requests that failed, of which an answer ended, or, with ``every_token``, that got a
            token, each once.

        Raises:
            BaseException: An interrupt or an internal error. The engine has been ``reset``, because
                the interrupted step may have left it inconsistent.
        """
        self.clock.lap("output")
        try:
            self._step(meanwhile)
        except BaseException:
            self.reset()
            raise
        changed, self._changed = self._changed, {}
        return list(changed)

    def _step(self, meanwhile: Callable[[], None]) -> None:
        before, self._flight = self._flight, None
        if before is not None and self.sampler.reads_answers(before.batch):
            self._land(before)
            before = None
        if self.scheduler.has_work:
            with self.gate.closed():
                step = self.scheduler.schedule()
                self.clock.lap("plan", step.kind)
                failure = self._try_launch(step)
            if failure is not None:
                self._land(before)
                self._recover(step, failure)
                return
            self.clock.lap("launch")
        meanwhile()
        self.clock.lap("output")
        self._land(before)
        self._draw_constrained()
        if not self.config.run_ahead:
            landing, self._flight = self._flight, None
            self._land(landing)

    def _try_launch(self, step: Step) -> Exception | None:
        """Launch ``step`` if it has a sequence; return the exception if that fails."""
        if not step.num_sequences:
            return None
        try:
            self.clock.begin_launches(step.kind)
            launched = self._launch(step)
            if launched.is_constrained:
                self._pass = launched
            else:
                self._flight = self._draw(launched)
                self.clock.end_launches()
        except Exception as error:
            return error
        return None

    def _launch(self, step: Step) -> _Pass:
        logits, prompts = self.runner.run(step)
        failed = []
        for request, prompt_logits in prompts:
            begin, number = len(request.prompt_logprobs), request.params.prompt_logprobs
            followers = request.prompt_token_ids[begin + 1 : begin + 1 + len(prompt_logits)]
            try:
                request.prompt_logprobs += self.sampler.prompt_logprobs(
                    prompt_logits, followers, number or 0
                )
            except FloatingPointError as error:
                failed.append((request, str(error)))
        self.scheduler.computed(step)
        table, more = self.scheduler.table, []
        # The first tokens of all answers to a prompt are drawn from one row of the logits
        places = [*range(len(step.decodes.rows))]
        for place, chunk in enumerate((c for c in step.chunks if c.samples), len(places)):
            drawn = [chunk.sequence, *self.scheduler.fork(chunk.sequence)]
            more += [sequence.row for sequence in drawn]
            places += [place] * len(drawn)
        rows = np.concatenate([step.decodes.rows, np.array(more, np.int64)])
        return _Pass(
            step,
            logits,
            rows,
            table.serials[rows],
            table.lengths[rows],
            np.array(places, np.int64),
            failed,
            bool(table.records["constrained"][rows].any()),
        )

    def _draw(self, launched: _Pass, bits: Words | None = None) -> _Flight:
        """Launch the draws of ``launched``, with ``bits`` of tokens for constrained sequences."""
        table, rows, logits = self.scheduler.table, launched.rows, launched.logits
        batch = DrawBatch.of_rows(table, rows)
        if not len(rows):
            return _Flight(launched.step, rows, launched.serials, batch, None, launched.failed)
        if not np.array_equal(launched.places, np.arange(len(logits))):
            (there,) = to_device([launched.places], logits.device)
            logits = logits[there]
        tokens = self.sampler.draw(logits, batch, bits)
        self.runner.store_last_tokens(tokens.token_ids)
        table.drew(rows)
        return _Flight(launched.step, rows, launched.serials, batch, tokens, launched.failed)

    def _draw_constrained(self) -> None:
        """Launch the draws of a pass of constrained sequences, if one waits for them.

        The step before has landed, so all tokens are known.
        """
        launched, self._pass = self._pass, None
        if launched is None:
            return
        launched = self._still_drawing(launched)
        table = self.scheduler.table
        is_constrained = table.records["constrained"][launched.rows]
        constrained: list[Sequence] = [*table.owners[launched.rows[is_constrained]]]
        try:
            bits = None
            if constrained:
                bits, failed = self.masks.compute(constrained)
                for sequence, error in failed.items():
                    if not sequence.request.error:
                        self._fail(sequence.request, str(error), error)
                if failed:
                    # Other answers of a request are dropped with it
                    bits = bits[[s.table is not None for s in constrained]]
                    launched = self._still_drawing(launched)
            self._flight = self._draw(launched, bits if bits is not None and len(bits) else None)
            self.clock.end_launches()
            self.clock.lap("launch", launched.step.kind)
        except Exception as error:
            self._recover(launched.step, error)

    def _still_drawing(self, launched: _Pass) -> _Pass:
        """Return ``launched`` without sequences that have ended or got further tokens since."""
        table, rows = self.scheduler.table, launched.rows
        kept = (table.serials[rows] == launched.serials) & (table.lengths[rows] == launched.lengths)
        return replace(
            launched,
            rows=rows[kept],
            serials=launched.serials[kept],
            lengths=launched.lengths[kept],
            places=launched.places[kept],
        )

    def _land(self, flight: _Flight | None) -> None:
        """Wait for a step and append its tokens to the sequences that are still unfinished."""
        if flight is None:
            return
        kind = flight.step.kind
        try:
            if flight.drawn is not None:
                flight.drawn.wait()
            self.clock.lap("wait", kind)
            self.clock.collect()
            choices = NO_CHOICES if flight.drawn is None else flight.drawn.choices()
        except Exception as error:
            for lost in (flight, self._flight):
                for sequence in lost.batch.sequences if lost else ():
                    sequence.num_pending = 0
            self._flight = self._pass = None
            self._recover(flight.step, error)
            return
        for request, reason in flight.failed:
            self._fail(request, reason)
        # The rest of the tokens may end an answer, or a sequence asks for more than tokens
        rest = self.scheduler.table.append(
            flight.rows, flight.serials, choices.token_ids, choices.is_finite
        ).tolist()
        got: list[Sequence] = []
        forced = 0
        for place in rest:
            sequence, choice = flight.batch.sequences[place], choices[place]
            if not sequence.num_pending:
                continue
            if not choice.is_finite:
                self._fail_of_logits(sequence, choice.largest_logit)
                continue
            try:
                sequence.append(choice.token_id, choice.logprobs)
                forced += sequence.append_forced() if self._may_force else 0
            except StructuredOutputError as error:
                self._fail(sequence.request, str(error), error)
            except Exception as error:
                self._fail(sequence.request, _failure("its tokens must have a text", error), error)
            else:
                got.append(sequence)
                if sequence.finish_reason or sequence.request.every_token:
                    self._changed[sequence.request] = None
        self.scheduler.finish(got)
        if not self._has_warned_of_length:
            self._warn_of_length(got)
        if self._suspects:
            self._clear(flight.step.requests)
        self.stats.forced_tokens += forced
        self._count(flight.step, len(choices) - len(rest) + len(got) + forced)
        self.clock.lap("land", kind)

    def _warn_of_length(self, sequences: list[Sequence]) -> None:
        """Log a warning, once, if an answer was cut off by the default of ``max_tokens``."""
        for sequence in sequences:
            request = sequence.request
            wanted = request.params.max_tokens
            if (
                sequence.finish_reason == "length"
                and wanted == request.max_tokens == _DEFAULT_MAX_TOKENS
            ):
                self._has_warned_of_length = True
                _logger.warning(
                    "request %s: the answer was cut off after %d tokens, the default of max_tokens; "
                    "set SamplingParams(max_tokens=...) for longer answers (said once)",
                    request.request_id,
                    wanted,
                )
                return

    def _recover(self, step: Step, error: Exception) -> None:
        self.scheduler.start_over()
        requests = {request for request in step.requests if not request.finished}
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            if self.scheduler.halve_budgets():
                _logger.warning(
                    "out of memory: steps are halved to %d tokens and %d patches",
                    self.scheduler.max_num_batched_tokens,
                    self.scheduler.max_patches,
                )
                return
        if len(requests) > 1:
            self._suspects |= requests
            self.scheduler.max_num_seqs = len(requests) // 2
            _logger.warning(
                "a step of %d requests failed with %s: %d sequences at once until the cause is found",
                len(requests),
                type(error).__name__,
                self.scheduler.max_num_seqs,
            )
            return
        # At most one request is left, and none if it has finished in the meantime
        for request in requests:
            self._fail(request, _failure("the model must run on it", error), error)

    def _fail(self, request: Request, reason: str, cause: Exception | None = None) -> None:
        """Fail one request and remove its pages and images from the caches."""
        is_structured = isinstance(cause, StructuredOutputError)
        kind = StructuredOutputError if is_structured else RequestFailedError
        request.error = kind(f"request {request.request_id}: {reason}")
        request.error.__cause__ = None if is_structured else cause
        _logger.warning("%s", request.error)
        self.cancel(request)
        self.scheduler.forget(request.sequences)
        self._changed[request] = None

    def _fail_of_logits(self, sequence: Sequence, largest: float) -> None:
        """Fail the request of a sequence that has no token to draw."""
        reason, cause = f"logits must be finite, got {largest} for the largest", None
        if sequence.request.constraint is not None and largest == -math.inf:
            reason = (
                "structured_outputs must leave a token beside allowed_token_ids, bad_words and "
                "min_tokens, got none"
            )
            cause = StructuredOutputError(reason)
        self._fail(sequence.request, reason, cause)

    def _clear(self, requests: set[Request]) -> None:
        self._suspects -= requests
        if not self._suspects:
            self.scheduler.max_num_seqs = self.config.max_num_seqs

    def _count(self, step: Step, num_drawn: int) -> None:
        stats, pages = self.stats, self.scheduler.pages
        stats.decode_steps += step.kind == "decode"
        stats.text_steps += step.kind == "text"
        stats.image_steps += step.kind == "image"
        stats.computed_tokens += step.num_tokens
        stats.cached_tokens += step.cached_tokens
        stats.generated_tokens += num_drawn
        stats.encoded_tiles += len(step.encodes)
        stats.encoded_patches += sum(tile.num_patches for tile, _ in step.encodes)
        stats.cached_tiles += step.cached_tiles
        stats.padded_tokens = self.runner.num_padded_tokens
        stats.padded_patches = self.runner.num_padded_patches
        stats.cache_usage = 1 - pages.num_free / pages.num_pages

    def cancel(self, request: Request) -> None:
        """Drop the unfinished sequences of ``request``."""
        self.scheduler.cancel(request.sequences)
        self._clear({request})


def _failure(wanted: str, error: Exception) -> str:
    return f"{wanted}, got {type(error).__name__}"
