"""The Python interface: ``LLM(model).generate(...)`` and ``.chat(...)``, in vLLM's shape."""

import gc
import logging
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import torch

from idefics2_engine.device import torch_defaults, torch_device
from idefics2_engine.errors import Idefics2Error, PromptError
from idefics2_engine.images.loader import MAX_BYTES, MAX_PIXELS, MEDIA_TIMEOUT, ImageSource
from idefics2_engine.llm_options import (
    LLMOptions,
    at_least_one,
    engine_config,
    find_folders,
    fit_kv_cache,
    generation_config,
    load_model,
)
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.outputs import RequestOutput, failed_output
from idefics2_engine.prefetcher import Prefetcher
from idefics2_engine.progress_bar import Progress
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor
from idefics2_engine.request_builder import (
    Conversation,
    Prompt,
    RequestBuilder,
    RowDraft,
    read_params,
    row_error,
)
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.engine_thread import EngineThread
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Request
from idefics2_kernels import Ops

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _EndOfRows:
    """Follows the last row that ``iterate`` has read."""

    count: int
    error: BaseException | None  # what the source of the rows raised instead of ending


class LLM:
    """An Idefics2 model that answers questions about images.

    The engine runs on a thread of its own. Any thread may call any method at any time, several at
    once too: their requests share the engine's steps. An exception in the caller's thread, such as
    Ctrl-C, cancels that call's requests and no others. Use the object as a context, or ``close``
    it, to give back the memory at a chosen point.

    Attributes:
        config: The model's.
        processor: Turns text and images into the model's input.
        model: The network.
        engine_config: Sizes of the runtime.
        engine: Answers requests; it belongs to its thread while any call is unfinished.
        stats: What the engine has done so far.
        request_builder: Turns prompts and parameters into requests for ``engine``.

    Its arguments are the fields of ``idefics2_engine.llm_options.LLMOptions``, which describes
    each.

    Raises:
        ConfigError: The model cannot be found, a file of it is missing or wrong, or an argument
            does not fit it.
        CheckpointError: The weights are missing, do not fit the config, or fail a check that was
            asked for.
    """

    @torch_defaults()
    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
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
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 8192,
        enable_prefix_caching: bool = True,
        kv_cache_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        seed: int = 0,
        sampling_order: str = "vllm",
        image_policy: str = "parity",
        max_image_pixels: int = MAX_PIXELS,
        max_media_bytes: int = MAX_BYTES,
        allowed_media_root: str | Path | None = None,
        allowed_media_hosts: Sequence[str] = (),
        media_timeout: float = MEDIA_TIMEOUT,
        image_threads: int | None = None,
        ops: Ops | None = None,
    ) -> None:
        # All arguments, which are the only local names yet
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
        generation = generation_config(folder, self.processor.tokenizer)
        self.engine = Engine(
            self.model,
            self.processor.tokenizer,
            self.processor.image_config,
            generation,
            self.engine_config,
            min_p_first=options.sampling_order == "vllm",
        )
        self.request_builder = RequestBuilder(
            self.processor, self.config, generation, self.engine_config.max_model_len, options.seed
        )
        if on.type == "cuda":
            # Weights may have been copied on a stream of the caller's, which the engine does not
            # wait for
            torch.cuda.synchronize(on)
        self.stats = self.engine.stats
        self._thread = EngineThread(self.engine)
        # At the latest when the object is collected or the process ends
        self._finalizer = weakref.finalize(self, self._thread.close)

    def close(self) -> None:
        """End the engine's thread and give back the memory of the model and its cache.

        Calls that are unfinished on other threads raise ``RuntimeError``, and so does every later
        call.
        """
        self._finalizer()
        for name in ("model", "engine"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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
        """Continue raw prompts; control tokens in their text are control tokens.

        Args:
            prompts: One prompt or several.
            sampling_params: For all of them, or one each.
            progress: Whether to show a progress bar.

        Returns:
            One output a prompt, in order.

        Raises:
            PromptError: A prompt is malformed, does not fit its images, or is too long.
            ImageError: An image cannot be read.
            SamplingError: A sampling parameter does not fit the model.
        """
        drafts = self.request_builder.read_prompts(prompts)
        return self._answer(self.processor.finish(drafts), sampling_params, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]] = (),
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer conversations; nothing typed in them becomes a control token.

        Args:
            messages: One conversation or several.
            sampling_params: For all of them, or one each.
            images: For parts ``{"type": "image"}`` without an image of their own, in order. Of
                several conversations a list for each.
            progress: Whether to show a progress bar.

        Returns:
            One output a conversation, in order.

        Raises:
            PromptError: A conversation is malformed or too long, or the model has not learned to
                chat.
            ImageError: An image cannot be read.
            SamplingError: A sampling parameter does not fit the model.
        """
        drafts = self.request_builder.read_conversations(messages, images)
        return self._answer(self.processor.finish(drafts, "messages"), sampling_params, progress)

    def stream(
        self, prompt: Prompt | Conversation, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one prompt or conversation, yielding its output after every token.

        Text that may turn out to be a stop string, or half a character, is held back. What is wrong
        with the prompt is raised by this call; the answer begins when the iterator is first asked,
        and is dropped when it is closed.
        """
        draft = self.request_builder.read(prompt)
        (processed,) = self.processor.finish([draft])
        return self._stream(self.request_builder.build(processed, read_params(sampling_params)))

    def iterate(
        self,
        prompts: Iterable[Prompt | Conversation | tuple[Prompt | Conversation, SamplingParams]],
        sampling_params: SamplingParams | None = None,
        *,
        in_flight: int | None = None,
        progress: bool = False,
    ) -> Generator[RequestOutput, None, None]:
        """Answer prompts and conversations as they come, yielding each output when it is finished.

        Args:
            prompts: Are read lazily, on a thread of their own, ``in_flight`` before they are
                answered at most. What a prompt holds is copied when it is read, so that the source
                may use its objects again; image files are read in threads later. Each may be a pair
                with its own parameters.
            sampling_params: For all others.
            in_flight: Requests begun and not yielded; twice ``max_num_seqs`` if ``None``.
            progress: Whether to show a progress bar; its total is known if ``prompts`` has a
                length.

        Yields:
            Outputs in the order in which they finish; ``request_id`` is the place among
            ``prompts``, from "0". One that is malformed, does not fit or fails has its ``error``
            and keeps none of the others from being answered.

        Raises:
            PromptError: ``prompts`` is one prompt, not an iterable of them.
            Exception: What iterating over ``prompts`` raised, after all that was read before has
                been answered.
        """
        if in_flight is None:
            in_flight = 2 * self.engine_config.max_num_seqs
        at_least_one("in_flight", in_flight)
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise PromptError(
                f"prompts must be an iterable of prompts, got {type(prompts).__name__}"
            )
        shared = read_params(sampling_params)
        total = len(prompts) if isinstance(prompts, Sized) else None
        bar = Progress(self.stats, total, progress)
        return self._iterate(iter(prompts), shared, in_flight, bar)

    def _iterate(
        self, rows: Iterator[Any], shared: SamplingParams, in_flight: int, bar: Progress
    ) -> Generator[RequestOutput, None, None]:
        events: SimpleQueue[Request | RequestOutput | _EndOfRows | BaseException] = SimpleQueue()
        builder = self.request_builder

        def refuse(index: int, error: Idefics2Error) -> None:
            _logger.info("row %d is refused: %s", index, error)
            events.put(failed_output(str(index), error))

        def read(index: int, row: object) -> RowDraft | None:
            try:
                return builder.read_row(row, shared)
            except Idefics2Error as error:
                refuse(index, error)
                return None

        def prepare(index: int, draft: RowDraft) -> None:
            try:
                client.submit([builder.build_row(draft, str(index))])
            except BaseException as error:
                refuse(index, row_error(error))

        def end(count: int, error: BaseException | None) -> None:
            events.put(_EndOfRows(count, error))

        client = self._thread.client(events.put, events.put)
        threads = self.processor.media.num_threads
        rows_ahead = Prefetcher(rows, read, prepare, end, threads=threads, ahead=in_flight)
        yielded, end_of_rows = 0, None
        with bar, client, rows_ahead:
            while end_of_rows is None or yielded < end_of_rows.count:
                event = _take(events)
                if isinstance(event, _EndOfRows):
                    end_of_rows = event
                    continue
                yielded += 1
                rows_ahead.done()
                bar.update(1)
                yield event.output() if isinstance(event, Request) else event
        if end_of_rows.error is not None:
            raise end_of_rows.error

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


def _take(events: SimpleQueue[Any]) -> Any:
    """Wait for the next event and return it; raise it if it says why there will be no more."""
    event = events.get()
    if isinstance(event, BaseException):
        raise event
    return event
