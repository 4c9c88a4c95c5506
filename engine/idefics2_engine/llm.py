"""The Python interface, modeled on vLLM's: ``LLM(model).generate(...)`` and ``.chat(...)``."""

import gc
import logging
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, Self

import torch

from idefics2_engine.device import torch_defaults, torch_device
from idefics2_engine.errors import Idefics2Error, PromptError
from idefics2_engine.images.loader import MAX_BYTES, MAX_PIXELS, MEDIA_TIMEOUT, ImageSource
from idefics2_engine.images.reader import ImageReader
from idefics2_engine.llm_options import (
    LLMOptions,
    at_least_one,
    engine_config,
    find_folders,
    fit_kv_cache,
    image_workers_on,
    load_model,
)
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.outputs import RequestOutput, RowOutputs, failed_output
from idefics2_engine.prefetcher import Prefetcher
from idefics2_engine.progress_bar import Progress
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor
from idefics2_engine.request_builder import (
    RequestBuilder,
    RowDraft,
    read_params,
    row_error,
    row_key,
)
from idefics2_engine.row import Conversation, Prompt, Row
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.engine_thread import EngineThread
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Request
from idefics2_engine.submitter import Submitter
from idefics2_kernels import Ops

_logger = logging.getLogger(__name__)

# Prepared images of rows in flight, in bytes
MAX_PREPARED_BYTES = 2 << 30

_Events = SimpleQueue[Request | RequestOutput | BaseException | None]
"""Finished requests, outputs of refused rows, errors of the engine, and None at the end of rows."""


class LLM:
    """An Idefics2 model that answers questions about images.

    The engine runs on its own thread. All methods are thread-safe, and requests of concurrent calls
    share the engine's steps. An exception in the caller's thread, such as ``KeyboardInterrupt``,
    cancels only the requests of that call. Use the object as a context manager, or call ``close``,
    to free its memory at a chosen point.

    The arguments are the fields of ``idefics2_engine.llm_options.LLMOptions``, which documents
    them.

    Attributes:
        config: Configuration of the model.
        processor: Converts text and images to the model's input.
        model: The network.
        engine_config: Sizes of the runtime.
        engine: Answers requests. Only its thread may use it while a call is unfinished.
        stats: Counters of the engine.
        images: Reads the images of requests.
        request_builder: Converts prompts and parameters to requests for ``engine``.

    Raises:
        ConfigError: The model is not found, one of its files is missing or invalid, or an argument
            does not fit the model.
        CheckpointError: The weights are missing, do not fit the config, or fail a requested check.
    """

    @torch_defaults()
    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        merge_adapter: bool | None = None,
        verify: bool = False,
        check_finite: bool = False,
        load_format: str = "auto",
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        quantized_parts: Sequence[str] | None = None,
        double_quant: bool = True,
        split_images: bool | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = 8192,
        enable_prefix_caching: bool = True,
        kv_cache_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        share_prefix_reads: bool = False,
        seed: int = 0,
        sampling_order: str = "vllm",
        image_policy: str = "parity",
        max_image_pixels: int = MAX_PIXELS,
        max_media_bytes: int = MAX_BYTES,
        allowed_media_root: str | Path | None = None,
        allowed_media_hosts: Sequence[str] = (),
        media_timeout: float = MEDIA_TIMEOUT,
        image_threads: int | None = None,
        image_workers: int | None = None,
        ops: Ops | None = None,
    ) -> None:
        # locals() holds exactly the arguments here, so this must be the first statement
        options = LLMOptions(**{name: value for name, value in locals().items() if name != "self"})
        to_quantize = options.to_quantize
        folder, adapter_folder = find_folders(options)
        config = ModelConfig.load(folder)
        self.processor = Processor.load(folder, config, options.split_images, options.media)
        on = torch_device(options.device)
        sizes = engine_config(options, config, on)
        self.model = load_model(options, config, on, folder, adapter_folder, to_quantize)
        self.config = self.model.config
        self.engine_config = fit_kv_cache(options, sizes, self.model)
        generation = GenerationConfig.of_checkpoint(folder, self.processor.tokenizer)
        self.images = self.processor.image_reader(image_workers_on(on, options, self.processor))
        if on.type == "cuda":
            # The weights may have been copied on the caller's current stream, and the engine's
            # thread does not wait for that stream
            torch.cuda.synchronize(on)

        # This must not refer to the LLM, which its thread would keep alive
        build_engine = partial(
            Engine,
            self.model,
            self.processor.tokenizer,
            self.processor.image_config,
            generation,
            self.engine_config,
            min_p_first=options.sampling_order == "vllm",
        )
        self._thread = EngineThread(build_engine, self.model.device)
        self._submitter = Submitter(self._thread, self.images, self._thread.engine.gate.wait)
        # They also end when this object is garbage-collected or the process exits
        self._finalizer = weakref.finalize(self, _close, self._thread, self._submitter, self.images)
        self.engine = self._thread.engine
        self.stats = self.engine.stats
        # A closed object has no engine, and its calls say so
        self._gate = self.engine.gate
        self.request_builder = RequestBuilder(
            self.processor,
            self.config,
            generation,
            self.engine_config.max_model_len,
            options.seed,
            self.images,
        )

    def close(self) -> None:
        """End the engine's thread and workers, and free the memory of the model and its KV cache.

        Unfinished calls on other threads and unfinished futures raise ``RuntimeError``. So does
        every later call.
        """
        self._finalizer()
        for name in ("model", "engine"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "LLM: a model in memory cannot be pickled or copied; build one in each process"
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close it."""
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue raw prompts, in which control tokens are recognized.

        Args:
            prompts: One prompt or several.
            sampling_params: Parameters for all prompts, or one object for each.
            progress: Whether to show a progress bar.

        Returns:
            One output for each prompt, in order.

        Raises:
            PromptError: A prompt is malformed, does not fit its images, or is too long.
            ImageError: An image cannot be read.
            SamplingError: A sampling parameter does not fit the model.
        """
        drafts = self.request_builder.read_prompts(prompts)
        return self._answer(self.request_builder.finish(drafts), sampling_params, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]] = (),
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer conversations, in whose text control tokens are not recognized.

        Args:
            messages: One conversation or several.
            sampling_params: Parameters for all conversations, or one object for each.
            images: Images for the parts ``{"type": "image"}`` that have no source, in order. For
                several conversations, a list for each.
            progress: Whether to show a progress bar.

        Returns:
            One output for each conversation, in order.

        Raises:
            PromptError: A conversation is malformed or too long, or the model has no chat template.
            ImageError: An image cannot be read.
            SamplingError: A sampling parameter does not fit the model.
        """
        drafts = self.request_builder.read_conversations(messages, images)
        prompts = self.request_builder.finish(drafts, "messages")
        return self._answer(prompts, sampling_params, progress)

    def stream(
        self, prompt: Prompt | Conversation, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one prompt or conversation, yielding its output after every token.

        Text that may become a stop string is held back, and so is an incomplete character. This
        call raises the errors of the prompt. Generation starts at the first ``next`` of the
        iterator. Closing the iterator cancels the request.
        """
        draft = self.request_builder.read(prompt)
        (processed,) = self.request_builder.finish([draft])
        return self._stream(self.request_builder.build(processed, read_params(sampling_params)))

    def iterate(
        self,
        prompts: Iterable[
            Row | Prompt | Conversation | tuple[Prompt | Conversation, SamplingParams]
        ],
        sampling_params: SamplingParams | None = None,
        *,
        in_flight: int | None = None,
        max_prepared_bytes: int = MAX_PREPARED_BYTES,
        progress: bool = False,
    ) -> RowOutputs:
        """Answer a stream of prompts and conversations, yielding each output when it is finished.

        Args:
            prompts: Prompts and conversations. Each may be a pair with its own parameters, or a
                ``Row`` with a key and its own parameters. They are read lazily on a separate
                thread, at most ``in_flight`` ahead of the answers. Each prompt is copied when it is
                read, so the source may reuse its objects. Image files are read later, in threads,
                and in processes if they are many (``image_workers``).
            sampling_params: Parameters of the prompts that have none of their own.
            in_flight: Requests begun and not yet yielded; twice ``max_num_seqs`` if ``None``.
            max_prepared_bytes: Prompts are read and prepared while the prepared images of requests
                that are not yet yielded have fewer bytes. Requests share the images of equal files.
            progress: Whether to show a progress bar. It has a total if ``prompts`` has a length.

        Returns:
            An iterator of the outputs in the order in which they finish. ``request_id`` is the
            index in ``prompts``, from "0", and ``key`` that of the ``Row``. The output of a
            malformed, unsuitable or failed request has an ``error``; the other requests go on.
            ``drain`` of the iterator reads no more prompts; ``close`` also cancels requests.

            If iterating over ``prompts`` raises an exception, the iterator raises it after every
            prompt read before has been answered.

        Raises:
            PromptError: ``prompts`` is one prompt, not an iterable of them.
            ConfigError: ``in_flight`` or ``max_prepared_bytes`` is not a positive integer.
        """
        if in_flight is None:
            in_flight = 2 * self.engine_config.max_num_seqs
        in_flight = at_least_one("in_flight", in_flight)
        max_bytes = at_least_one("max_prepared_bytes", max_prepared_bytes)
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise PromptError(
                f"prompts must be an iterable of prompts, got {type(prompts).__name__}"
            )
        shared = read_params(sampling_params)
        total = len(prompts) if isinstance(prompts, Sized) else None
        bar = Progress(self.stats, total, progress)
        events: _Events = SimpleQueue()
        rows_ahead: Prefetcher[object, RowDraft] = Prefetcher(
            iter(prompts),
            partial(events.put, None),
            threads=self.images.num_threads,
            ahead=in_flight,
            max_bytes=max_bytes,
            wait_turn=self._gate.wait,
        )
        return RowOutputs(self._iterate(rows_ahead, events, shared, bar), rows_ahead.drain)

    def _iterate(
        self,
        rows_ahead: Prefetcher[object, RowDraft],
        events: _Events,
        shared: SamplingParams,
        bar: Progress,
    ) -> Generator[RequestOutput, None, None]:
        builder = self.request_builder

        def refuse(index: int, key: str | int | None, error: Idefics2Error) -> None:
            _logger.info("row %d is refused: %s", index, error)
            events.put(failed_output(str(index), error, key))

        def read(index: int, row: object) -> RowDraft | None:
            try:
                return builder.read_row(row, shared, index)
            except Idefics2Error as error:
                refuse(index, row_key(row), error)
                return None

        def prepare(index: int, draft: RowDraft) -> None:
            try:
                request = builder.build_row(draft, str(index), images)
                rows_ahead.hold(request.tiles)
                client.submit([request])
            except BaseException as error:
                refuse(index, draft.key, row_error(error))

        client = self._thread.client(events.put, events.put)
        images = self.images.job()
        yielded = 0
        with bar, client, rows_ahead.start(read, prepare):
            while not rows_ahead.has_ended or yielded < rows_ahead.count:
                event = _take(events)
                # The rows have ended, which the condition sees
                if event is None:
                    continue
                yielded += 1
                rows_ahead.done(event.tiles if isinstance(event, Request) else ())
                bar.update(1)
                yield event.output() if isinstance(event, Request) else event
        if rows_ahead.error is not None:
            raise rows_ahead.error

    def submit(
        self,
        row: Row | Prompt | Conversation | tuple[Prompt | Conversation, SamplingParams],
        sampling_params: SamplingParams | None = None,
    ) -> Future[RequestOutput]:
        """Begin to answer one prompt or conversation, without waiting for the answer.

        Any thread may call this, and any number of futures may be unfinished. The row is copied
        before the call returns. Threads read its images.

        Args:
            row: A prompt or conversation, a pair with its own parameters, or a ``Row``.
            sampling_params: Parameters of a row that has none of its own.

        Returns:
            The future of the output. Its exception is the error of the row or of its request. Until
            it is done, its ``cancel`` succeeds and cancels the request. The callbacks of all
            futures run on one thread.

        Raises:
            RuntimeError: The model was closed. If it is closed later, unfinished futures get this.
        """
        return self._submitter.submit(self.request_builder, row, sampling_params)

    def _stream(self, request: Request) -> Generator[RequestOutput, None, None]:
        events: SimpleQueue[RequestOutput | BaseException] = SimpleQueue()

        def put(changed: Request) -> None:
            events.put(changed.output())

        with self._thread.client(put, events.put, every_token=True) as client:
            client.submit([request])
            finished = False
            while not finished:
                output = _take(events)
                if output.error is not None:
                    raise output.error
                finished = output.finished
                yield output

    def _answer(
        self,
        prompts: list[ProcessedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        requests = self.request_builder.build_all(prompts, sampling_params)
        events: SimpleQueue[Request | BaseException] = SimpleQueue()
        bar = Progress(self.stats, len(requests), progress)
        with bar, self._thread.client(events.put, events.put) as client:
            client.submit(requests)
            for _ in requests:
                _take(events)
                bar.update(1)
        return [request.output() for request in requests]


def _close(thread: EngineThread, submitter: Submitter, images: ImageReader) -> None:
    thread.close()
    submitter.close()
    images.close()


def _take(events: SimpleQueue[Any]) -> Any:
    """Wait for the next event and return it, or raise it if it is an exception."""
    event = events.get()
    if isinstance(event, BaseException):
        raise event
    return event
