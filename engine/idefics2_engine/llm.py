"""The Python interface: ``LLM(model).generate(...)`` and ``.chat(...)``, in vLLM's shape."""

import random
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from idefics2_engine.bad_words import bad_words_ids, check_choice
from idefics2_engine.checkpoint import build_model, load_checkpoint
from idefics2_engine.config import GenerationConfig, ModelConfig
from idefics2_engine.engine import Engine
from idefics2_engine.errors import (
    ConfigError,
    Idefics2Error,
    PromptError,
    PromptTooLongError,
    SamplingError,
)
from idefics2_engine.hub import find_adapter
from idefics2_engine.image_items import image_items
from idefics2_engine.intake import Intake
from idefics2_engine.llm_arguments import (
    at_least_one,
    check_utilization,
    engine_config,
    model_folder,
    torch_device,
    torch_dtype,
)
from idefics2_engine.logprobs import check_entries
from idefics2_engine.media import MAX_BYTES, MAX_PIXELS, MEDIA_TIMEOUT, media_config
from idefics2_engine.memory import kv_cache_tokens as measured_kv_cache_tokens
from idefics2_engine.outputs import RequestOutput, failed_output
from idefics2_engine.processor import ProcessedPrompt, Processor, PromptDraft
from idefics2_engine.progress import Progress
from idefics2_engine.quantization import Quantization
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.sequence import Request
from idefics2_engine.shown import shown
from idefics2_engine.verify import verify_files
from idefics2_engine.weight_files import ADAPTER_WEIGHTS, weight_paths
from idefics2_kernels import REFERENCE, TRITON, Ops

Prompt = str | Mapping[str, Any]
"""A raw prompt: text, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}`` with
``"multi_modal_data": {"image": image or images}``."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages ``{"role": …, "content": …}`` in OpenAI's or transformers' shape."""


class LLM:
    """An Idefics2 model that answers questions about images.

    Args:
        model: A checkpoint in the hub's form: its folder, or its id on the hub, ``org/name`` or ``org/name@revision``, which is
            taken from the hub's cache or downloaded into it; the demo checkpoint if ``None``.
        revision: Branch, tag or commit of a hub id.
        adapter: A LoRA adapter in PEFT's format to merge, its folder or its id on the hub.
        verify: Compare the files with their published checksums first, and refuse weights that have none.
        check_finite: Look at every weight for NaN and infinity, and for overflow in ``dtype``.
        load_format: ``"auto"`` reads the weights; ``"dummy"`` draws random ones on the device, for benchmarks, and the
            folder needs none.
        device: ``"auto"`` takes a CUDA device if there is one.
        dtype: ``"auto"`` is bfloat16 on a CUDA device and float32 on a CPU.
        quantization: ``"nf4"`` quantises linear layers to bitsandbytes' NF4 while they are loaded. A checkpoint that is in NF4
            already is loaded as it is, without this.
        quantized_parts: Which layers: those of ``"vision"``, ``"connector"`` and ``"text"``; all of them if ``None``.
        double_quant: Whether to quantise the blocks' absolute maxima too, which saves 0.37 bits a weight.
        split_images: Whether to cut each image into quarters beside the whole; the checkpoint's choice if ``None``.
        max_model_len: Tokens of a prompt with its answer; the model's positions if ``None``.
        max_num_seqs: Answers that are generated at once.
        max_num_batched_tokens: Tokens that one forward pass computes at most; longer prompts take several.
        enable_prefix_caching: Whether to keep what was computed of prompts for others that begin the same, pictures included.
        kv_cache_tokens: Tokens that the KV cache holds. If ``None``: on a CUDA device what ``gpu_memory_utilization`` leaves
            for it, on a CPU enough for ``max_num_seqs`` full ones, but at most 65,536 unless one alone needs more.
        gpu_memory_utilization: Share of a CUDA device's memory that weights, steps and KV cache may take in all.
        enforce_eager: Whether to launch every kernel by itself, without CUDA graphs; ``REFERENCE`` is never recorded, and
            any other ``ops`` that read values back must not be.
        seed: Fixes the random numbers of requests without a seed of their own.
        sampling_order: ``"vllm"`` applies min-p before top-k and top-p, ``"hf"`` after, as transformers does.
        image_policy: How doubtful pictures are read: ``"parity"`` with transformers, ``"correct"``, or ``"strict"``,
            which refuses them (README, Images).
        max_image_pixels: Largest width x height of an image, checked before it is decoded.
        max_media_bytes: Largest image file, data URI or download.
        allowed_media_root: Folder that image files must lie below; anywhere if ``None``.
        allowed_media_hosts: Hosts that image URLs may name; none by default (``MediaConfig``).
        media_timeout: Seconds that a download may take.
        image_threads: Images that are read at once; the cores, but at most 8, if ``None``.
        ops: Filling of the operations to run on; ``TRITON`` on a CUDA device and ``REFERENCE`` on a CPU if ``None``.

    Raises:
        ConfigError: The model cannot be found, a file of it is missing or wrong, or an argument does not fit it.
        CheckpointError: The weights are missing, do not fit the config, or fail a check that was asked for.
    """

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
        if sampling_order not in ("vllm", "hf"):
            raise ConfigError(f"sampling_order must be 'vllm' or 'hf', got {shown(sampling_order)}")
        if load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format must be 'auto' or 'dummy', got {shown(load_format)}")
        if load_format == "dummy" and (adapter is not None or verify or check_finite):
            raise ConfigError(
                "load_format 'dummy' reads no weights: it must come without adapter, verify and check_finite"
            )
        to_quantize = Quantization.from_arguments(quantization, quantized_parts, double_quant)
        folder = model_folder(model, revision)
        adapter_folder = None if adapter is None else find_adapter(adapter)
        if verify:
            verify_files(folder, weight_paths(folder))
        if verify and adapter_folder is not None:
            verify_files(adapter_folder, [adapter_folder / ADAPTER_WEIGHTS])
        self.config = ModelConfig.load(folder)
        media = media_config(
            image_policy=image_policy,
            max_image_pixels=max_image_pixels,
            max_media_bytes=max_media_bytes,
            allowed_media_root=allowed_media_root,
            allowed_media_hosts=allowed_media_hosts,
            media_timeout=media_timeout,
            image_threads=image_threads,
        )
        self.processor = Processor.load(folder, self.config, split_images, media)
        check_utilization(gpu_memory_utilization)
        on = torch_device(device)
        has_cuda = on.type == "cuda"
        if ops is None:
            ops = TRITON if has_cuda else REFERENCE
        sizes = engine_config(
            self.config,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=kv_cache_tokens,
            prefix_caching=enable_prefix_caching,
            cuda_graphs=has_cuda and not enforce_eager and ops is not REFERENCE,
            run_ahead=has_cuda,
        )
        if load_format == "dummy":
            self.model = build_model(self.config, ops, on, torch_dtype(dtype, on), to_quantize)
            self.model.init_weights(double_quant=double_quant)
        else:
            self.model = load_checkpoint(
                folder,
                ops,
                on,
                torch_dtype(dtype, on),
                adapter=adapter_folder,
                check_finite=check_finite,
                quantization=to_quantize,
            )
        if has_cuda and kv_cache_tokens is None:
            fitting = measured_kv_cache_tokens(self.model, sizes, gpu_memory_utilization)
            sizes = replace(sizes, kv_cache_tokens=fitting)
        self.engine_config = sizes
        tokenizer = self.processor.tokenizer
        ends = [i for i in (tokenizer.eos_id, tokenizer.end_of_utterance_id) if i is not None]
        never = ((tokenizer.fake_image_id,), (tokenizer.image_id,))  # whatever the file says
        generation = GenerationConfig.load(folder).with_defaults(ends, never)
        self._engine = Engine(
            self.model,
            tokenizer,
            self.processor.image_config,
            generation,
            self.engine_config,
            min_p_first=sampling_order == "vllm",
        )
        self._seeds = random.Random(seed)
        self._count = 0
        self._is_iterating = False

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
        several = [prompts] if isinstance(prompts, (str, Mapping)) else _listed("prompts", prompts)
        drafts = [self._read_prompt(prompt) for prompt in several]
        return self._answer(self.processor.finish(drafts), sampling_params, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer conversations; nothing typed in them becomes a control token.

        Args:
            messages: One conversation or several.
            sampling_params: For all of them, or one each.
            progress: Whether to show a progress bar.

        Returns:
            One output a conversation, in order.

        Raises:
            PromptError: A conversation is malformed or too long, or the model has not learnt to chat.
            ImageError: An image cannot be read.
            SamplingError: A sampling parameter does not fit the model.
        """
        if isinstance(messages, (str, Mapping)):
            raise PromptError(
                f"messages must be a list of messages or of conversations, got {type(messages).__name__}"
            )
        several = [messages] if _is_conversation(messages) else _listed("messages", messages)
        drafts = [self.processor.draft_chat(cast(Conversation, one)) for one in several]
        return self._answer(self.processor.finish(drafts), sampling_params, progress)

    def stream(
        self, prompt: Prompt | Conversation, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one prompt or conversation, yielding its output after every token.

        Text that may turn out to be a stop string, or half a character, is held back. The iterator must be used up or
        closed before the next request, which raises ``RuntimeError`` otherwise.
        """
        if _is_conversation(prompt):
            draft = self.processor.draft_chat(cast(Conversation, prompt))
        else:
            draft = self._read_prompt(cast(Prompt, prompt))
        (processed,) = self.processor.finish([draft])
        request = self._request(processed, _read_params(sampling_params))
        return self._stream(request)

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
            prompts: Read lazily, ``in_flight`` before they are answered at most; pictures are read in threads meanwhile.
                Each may be a pair with its own parameters.
            sampling_params: For all others.
            in_flight: Requests begun and not yielded; twice ``max_num_seqs`` if ``None``.
            progress: Whether to show a progress bar; its total is known if ``prompts`` has a length.

        Yields:
            Outputs in the order in which they finish; ``request_id`` is the place among ``prompts``, from "0". One that is
            malformed, does not fit or fails has its ``error`` and keeps none of the others from being answered.

        The iterator must be used up or closed before the next request, which raises ``RuntimeError`` otherwise.
        """
        if in_flight is None:
            in_flight = 2 * self.engine_config.max_num_seqs
        at_least_one("in_flight", in_flight)
        shared = _read_params(sampling_params)
        self._begin([])
        total = len(prompts) if isinstance(prompts, Sized) else None
        bar = Progress(self._engine.stats, total, progress)
        return self._iterate(enumerate(prompts), shared, in_flight, bar)

    def _iterate(
        self,
        rows: Iterable[tuple[int, Any]],
        shared: SamplingParams,
        in_flight: int,
        bar: Progress,
    ) -> Generator[RequestOutput, None, None]:
        live: list[Request] = []

        def prepare(row: tuple[int, Any]) -> tuple[ProcessedPrompt, SamplingParams]:
            prompt, params = row[1] if isinstance(row[1], tuple) else (row[1], shared)
            if _is_conversation(prompt):
                draft = self.processor.draft_chat(prompt)
            else:
                draft = self._read_prompt(prompt)
            return self.processor.finish([draft])[0], _read_params(params)

        threads = self.processor.media.num_threads
        with bar, Intake(rows, prepare, threads, ahead=in_flight) as intake:
            self._is_iterating = True
            try:
                while live or not intake.is_empty:
                    while len(live) < in_flight and (taken := intake.take(wait=not live)):
                        (index, _), prepared = taken
                        try:
                            if isinstance(prepared, Idefics2Error):
                                raise prepared
                            request = self._request(*prepared, request_id=str(index))
                        except Idefics2Error as error:
                            bar.update(1)
                            yield failed_output(str(index), error)
                        else:
                            self._engine.add(request)
                            live.append(request)
                    if live:
                        self._engine.step()
                    finished = [request for request in live if request.finished]
                    live = [request for request in live if not request.finished]
                    bar.update(len(finished))
                    for request in finished:
                        yield request.output()
            finally:
                self._is_iterating = False
                for request in live:
                    self._engine.cancel(request)

    def _stream(self, request: Request) -> Generator[RequestOutput, None, None]:
        self._begin([request])
        try:
            while not request.finished:
                if self._engine.step():
                    yield request.output()
            if request.error is not None:
                raise request.error
        finally:
            self._engine.cancel(request)

    def _begin(self, requests: list[Request]) -> None:
        if self._engine.has_work or self._is_iterating:
            raise RuntimeError("an earlier stream is unfinished: use it up or close it first")
        for request in requests:
            self._engine.add(request)

    def _answer(
        self,
        prompts: list[ProcessedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        if isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str):
            params = [_read_params(one) for one in sampling_params]
        else:
            params = [_read_params(sampling_params)] * len(prompts)
        if len(params) != len(prompts):
            raise PromptError(
                f"sampling_params must be one or as many as the {len(prompts)} prompts, got {len(params)}"
            )
        requests = [self._request(*pair) for pair in zip(prompts, params, strict=True)]
        self._begin(requests)
        with Progress(self._engine.stats, len(requests), progress) as bar:
            try:
                unfinished = len(requests)
                while self._engine.has_work:
                    self._engine.step()
                    now = sum(not request.finished for request in requests) if progress else 0
                    bar.update(unfinished - now)
                    unfinished = now
            finally:
                for request in requests:
                    self._engine.cancel(request)
        return [request.output() for request in requests]

    def _request(
        self, prompt: ProcessedPrompt, params: SamplingParams, request_id: str | None = None
    ) -> Request:
        room = self.engine_config.max_model_len - len(prompt.token_ids)
        if not prompt.token_ids:
            raise PromptError("prompt must have at least one token, got none")
        if room < 1:
            raise PromptTooLongError(len(prompt.token_ids), self.engine_config.max_model_len)
        vocab_size = self.config.text.vocab_size
        params.check_vocabulary(vocab_size)
        bad_words = bad_words_ids(params.bad_words, self.processor.tokenizer)
        generation = self._engine.generation
        words = (*generation.bad_words_ids, *bad_words)
        check_choice(params, words, generation.eos_token_ids, vocab_size)
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        if params.min_tokens > max_tokens:
            raise SamplingError(
                f"min_tokens must be at most the {room} tokens that the prompt leaves of "
                f"{self.engine_config.max_model_len}, got {shown(params.min_tokens)}"
            )
        check_entries(params, len(prompt.token_ids), max_tokens, vocab_size)
        self._count += 1
        drawn = self._seeds.getrandbits(63)  # by a request with its own seed too
        return Request(
            request_id=str(self._count - 1) if request_id is None else request_id,
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
        )

    def _read_prompt(self, prompt: Prompt) -> PromptDraft:
        if isinstance(prompt, str):
            return self.processor.draft_prompt(prompt)
        if not isinstance(prompt, Mapping):
            raise PromptError(f"prompt must be text or a mapping, got {type(prompt).__name__}")
        unknown = prompt.keys() - {"prompt", "prompt_token_ids", "multi_modal_data"}
        given = prompt.keys() & {"prompt", "prompt_token_ids"}
        if unknown or len(given) != 1:
            raise PromptError(
                "prompt must have 'prompt' or 'prompt_token_ids', and may have 'multi_modal_data', "
                f"got {shown(sorted(map(str, prompt)))}"
            )
        media = prompt.get("multi_modal_data") or {}
        if not isinstance(media, Mapping) or media.keys() - {"image"}:
            raise PromptError(f"multi_modal_data must be {{'image': …}}, got {shown(media)}")
        images = media.get("image", [])
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if "prompt" in prompt:
            return self.processor.draft_prompt(prompt["prompt"], images)
        return self.processor.draft_token_prompt(prompt["prompt_token_ids"], images)


def _read_params(params: object) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise SamplingError(f"sampling_params must be SamplingParams, got {shown(params)}")
    return params


def _listed(name: str, values: Any) -> list[Any]:
    if not isinstance(values, Iterable):
        raise PromptError(f"{name} must be one or a list of them, got {type(values).__name__}")
    return list(values)


def _is_conversation(value: object) -> bool:
    """Tell one conversation from a prompt and from a list of conversations."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )
