"""Arguments of ``LLM``, their validation, and the configs and the model derived from them."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.checkpoint.hub import find_adapter, find_model
from idefics2_engine.checkpoint.loader import build_model, load_checkpoint
from idefics2_engine.checkpoint.shards import ADAPTER_WEIGHTS, weight_paths
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.device import pin_memory, torch_dtype
from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.field_checks import (
    ListOf,
    MismatchError,
    Number,
    OneOf,
    OrNone,
    Whole,
    check,
    check_fields,
    checked,
    flag,
    path,
    text,
)
from idefics2_engine.images.loader import (
    MAX_BYTES,
    MAX_PIXELS,
    MEDIA_TIMEOUT,
    MediaConfig,
    media_config,
)
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.workers.worker import aligned
from idefics2_engine.images.workers.worker_pool import WorkerPool, default_workers
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.quantization import PARTS, Quantization
from idefics2_engine.model_files import printable_path
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.runtime.config import (
    AT_ONCE,
    CACHE_TOKENS,
    LENGTH,
    PAGE_SIZE,
    EngineConfig,
    default_num_seqs,
    model_length,
)
from idefics2_engine.runtime.memory_profile import kv_cache_tokens as measured_kv_cache_tokens
from idefics2_kernels import REFERENCE, TRITON, Ops

# These bounds are far above any use. A larger number is a mistake and must be reported before
# anything of that size is allocated.
# Bound of pixels and bytes
_MOST_KEPT = 2**31 - 1
_MOST_SECONDS = 86400.0
_MOST_THREADS = 1024
_logger = logging.getLogger(__name__)
# Its cache has 8 GiB for the 8B model in 16 bit
_KV_CACHE_TOKENS = 65536


def _dtype(value: object) -> str | torch.dtype:
    """Accept a name or a floating ``torch.dtype``."""
    if isinstance(value, str) or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    got = str(value) if isinstance(value, torch.dtype) else short_repr(value)
    raise MismatchError("the name of a dtype or a floating torch.dtype", got)


def _device(value: object) -> str:
    """Accept a name or a ``torch.device``."""
    if isinstance(value, str | torch.device):
        return str(value)
    raise MismatchError("the name of a device", short_repr(value))


def _ops(value: object) -> Ops:
    if not isinstance(value, Ops):
        raise MismatchError("an instance of Ops", short_repr(value))
    return value


@dataclass(frozen=True, kw_only=True)
class LLMOptions:
    """Validated arguments of ``LLM``.

    Attributes:
        model: A checkpoint in the hub's format: its folder, or its hub id ``org/name`` or
            ``org/name@revision``, which is downloaded unless the hub's cache has it. If ``None``,
            the demo checkpoint.
        revision: Branch, tag or commit of a hub id.
        adapter: A LoRA or DoRA adapter in PEFT's format: its folder or its hub id.
        merge_adapter: Whether to merge the adapter into the weights, before quantization. If
            ``False``, it is kept unmerged beside all linear layers. If ``None``, it is kept beside
            weights in NF4 and merged into 16-bit weights (docs/checkpoints.md).
        verify: Compare the files with their published checksums first. Weights without a checksum
            are rejected.
        check_finite: Check every weight for NaN, infinity, and overflow in ``dtype``.
        load_format: ``"auto"`` reads the weights. ``"dummy"`` draws random weights on the device,
            for benchmarks; the folder then needs no weights.
        device: ``"auto"`` is a CUDA device if there is one, and otherwise the CPU.
        dtype: ``"auto"`` is bfloat16 on a CUDA device and float32 on a CPU.
        quantization: ``"nf4"`` quantizes linear layers to bitsandbytes' NF4 during loading. A
            checkpoint that is already in NF4 does not need this.
        quantized_parts: Parts whose layers are quantized: ``"vision"``, ``"connector"`` or
            ``"text"``. If ``None``, all three.
        double_quant: Whether to quantize the blocks' absolute maxima as well, which saves 0.37 bits
            per weight.
        split_images: Whether to add the four quarters of each image to the whole. If ``None``, the
            checkpoint decides.
        max_model_len: Most tokens of a prompt and its answer together. If ``None``, the model's
            positions.
        max_num_seqs: Most answers that are generated at once. If ``None``, 256 on a CUDA device and
            64 on a CPU.
        max_num_batched_tokens: Most tokens of one forward pass. Longer prompts need several passes.
        enable_prefix_caching: Whether to keep the KV cache of prompts for later prompts that start
            with the same tokens and images.
        kv_cache_tokens: Tokens that the KV cache holds. If ``None``, a CUDA device uses the memory
            that ``gpu_memory_utilization`` leaves. A CPU gets room for ``max_num_seqs`` full
            sequences, at most 65,536 tokens unless one sequence needs more.
        gpu_memory_utilization: Share of a CUDA device's memory that weights, steps and KV cache may
            use in all.
        enforce_eager: Whether to launch each kernel separately, without CUDA graphs. ``REFERENCE``
            is never captured. Other ``ops`` that copy values to the host need this.
        share_prefix_reads: Whether decode steps read the keys of a prefix that several sequences
            share once for all of them. It is faster for many questions about one long prefix. In 16
            bit, the rounding of logits then depends on which sequences share.
        seed: Determines the seeds of requests that have none.
        sampling_order: ``"vllm"`` applies min-p before top-k and top-p. ``"hf"`` applies it after
            them, like transformers.
        image_policy: How ambiguous images are read: ``"parity"`` follows transformers,
            ``"correct"`` corrects them, and ``"strict"`` rejects them (docs/images.md).
        max_image_pixels: Largest width x height of an image, checked before it is decoded.
        max_media_bytes: Largest size of an image file, data URI or download, in bytes.
        allowed_media_root: Folder that must contain all image files. If ``None``, any folder.
        allowed_media_hosts: Hosts that image URLs may name; none by default (``MediaConfig``).
        media_timeout: Longest duration of a download, in seconds.
        image_threads: Images that are read in parallel. If ``None``, the number of cores, at most
            8.
        image_workers: Processes that decode image files beside the engine, in jobs of many images.
            0 decodes in threads. If ``None``, on a CUDA device one fewer than the cores, from 1 to
            8, and 0 on a CPU.
        ops: Implementation of the operations. If ``None``, ``TRITON`` on a CUDA device and
            ``REFERENCE`` on a CPU.

    Raises:
        ConfigError: A value is of the wrong type or out of range, or two values contradict each
            other.
    """

    model: str | Path | None = checked(OrNone(path), None)
    revision: str | None = checked(OrNone(text), None)
    adapter: str | Path | None = checked(OrNone(path), None)
    merge_adapter: bool | None = checked(OrNone(flag), None)
    verify: bool = checked(flag, False)
    check_finite: bool = checked(flag, False)
    load_format: str = checked(OneOf("auto", "dummy"), "auto")
    device: str = checked(_device, "auto")
    dtype: str | torch.dtype = checked(_dtype, "auto")
    quantization: str | None = checked(OrNone(OneOf("nf4")), None)
    quantized_parts: tuple[str, ...] | None = checked(
        OrNone(ListOf(OneOf(*PARTS), "parts", 1)), None
    )
    double_quant: bool = checked(flag, True)
    split_images: bool | None = checked(OrNone(flag), None)
    max_model_len: int | None = checked(OrNone(LENGTH), None)
    max_num_seqs: int | None = checked(OrNone(AT_ONCE), None)
    max_num_batched_tokens: int = checked(AT_ONCE, 8192)
    enable_prefix_caching: bool = checked(flag, True)
    kv_cache_tokens: int | None = checked(OrNone(CACHE_TOKENS), None)
    gpu_memory_utilization: float = checked(Number(0.0, 1.0, above=True), 0.9)
    enforce_eager: bool = checked(flag, False)
    share_prefix_reads: bool = checked(flag, False)
    seed: int = checked(Whole(-(2**63), 2**63 - 1), 0)
    sampling_order: str = checked(OneOf("vllm", "hf"), "vllm")
    image_policy: str = checked(OneOf(*ImagePolicy), "parity")
    max_image_pixels: int = checked(Whole(1, _MOST_KEPT), MAX_PIXELS)
    max_media_bytes: int = checked(Whole(1, _MOST_KEPT), MAX_BYTES)
    allowed_media_root: str | Path | None = checked(OrNone(path), None)
    allowed_media_hosts: tuple[str, ...] = checked(ListOf(text, "names of hosts"), ())
    media_timeout: float = checked(Number(0.0, _MOST_SECONDS, above=True), MEDIA_TIMEOUT)
    image_threads: int | None = checked(OrNone(Whole(1, _MOST_THREADS)), None)
    image_workers: int | None = checked(OrNone(Whole(0, _MOST_THREADS)), None)
    ops: Ops | None = checked(OrNone(_ops), None)

    def __post_init__(self) -> None:
        """Check every argument, then combinations of arguments."""
        check_fields(self, ConfigError)
        if self.adapter is None and self.merge_adapter is not None:
            raise ConfigError(f"merge_adapter must come with an adapter, got {self.merge_adapter}")
        reads_weights = self.adapter is not None or self.verify or self.check_finite
        if self.load_format == "dummy" and reads_weights:
            raise ConfigError(
                "load_format 'dummy' reads no weights: it must come without adapter, verify and check_finite"
            )

    @property
    def to_quantize(self) -> Quantization | None:
        """Quantization during loading; ``ConfigError`` if arguments contradict each other."""
        return Quantization.from_arguments(
            self.quantization, self.quantized_parts, self.double_quant
        )

    @property
    def media(self) -> MediaConfig:
        """The rules by which images are read."""
        return media_config(
            image_policy=self.image_policy,
            max_image_pixels=self.max_image_pixels,
            max_media_bytes=self.max_media_bytes,
            allowed_media_root=self.allowed_media_root,
            allowed_media_hosts=self.allowed_media_hosts,
            media_timeout=self.media_timeout,
            image_threads=self.image_threads,
        )

    def ops_on(self, device: torch.device) -> Ops:
        """Return the implementation of the operations for ``device``."""
        return self.ops or (TRITON if device.type == "cuda" else REFERENCE)


def model_folder(model: str | Path | None, revision: str | None) -> Path:
    """Return the folder of ``model``, or of the demo checkpoint for ``None``."""
    if model is not None:
        return find_model(model, revision)
    if revision is not None:
        raise ConfigError(f"revision must come with a model, got {revision!r}")
    return DEMO_MODEL


def find_folders(options: LLMOptions) -> tuple[Path, Path | None]:
    """Return the folders of the model and the adapter, downloaded and verified as requested."""
    model = model_folder(options.model, options.revision)
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    if options.verify:
        verify_files(model, weight_paths(model))
    if options.verify and adapter is not None:
        verify_files(adapter, [adapter / ADAPTER_WEIGHTS])
    return model, adapter


def engine_config(options: LLMOptions, config: ModelConfig, device: torch.device) -> EngineConfig:
    """Return the sizes of the runtime on ``device`` that are known before the model is loaded.

    Raises:
        ConfigError: A size does not fit the model or another size.
    """
    has_cuda = device.type == "cuda"
    length = model_length(options.max_model_len, config.text.max_positions)
    max_num_seqs = options.max_num_seqs or default_num_seqs(on_gpu=has_cuda)
    kv_cache_tokens = options.kv_cache_tokens
    if kv_cache_tokens is None:
        whole_pages = -(-length // PAGE_SIZE) * PAGE_SIZE
        wanted = max_num_seqs * whole_pages
        kv_cache_tokens = max(whole_pages, min(_KV_CACHE_TOKENS, wanted))
    if kv_cache_tokens < length:
        raise ConfigError(
            f"kv_cache_tokens must be at least max_model_len {length}, got {kv_cache_tokens}"
        )
    on_reference = options.ops_on(device) is REFERENCE
    return EngineConfig(
        max_model_len=length,
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
        max_num_batched_tokens=options.max_num_batched_tokens,
        prefix_caching=options.enable_prefix_caching,
        cuda_graphs=has_cuda and not options.enforce_eager and not on_reference,
        share_prefix_reads=options.share_prefix_reads,
        run_ahead=has_cuda,
    )


def load_model(
    options: LLMOptions,
    config: ModelConfig,
    device: torch.device,
    folder: Path,
    adapter: Path | None,
    quantization: Quantization | None,
) -> Idefics2:
    """Load the model of ``folder`` to ``device``, or draw random weights there.

    Raises:
        ConfigError: An argument does not fit the checkpoint.
        CheckpointError: The weights are missing, do not fit ``config``, or fail a check.
    """
    ops, dtype = options.ops_on(device), torch_dtype(options.dtype, device)
    if options.load_format == "dummy":
        model = build_model(config, ops, device, dtype, quantization)
        model.init_weights(double_quant=options.double_quant)
        _logger.info(
            "drew random weights for %s, quantization %s, %s on %s: %.1f MB",
            printable_path(folder),
            options.quantization,
            str(dtype).removeprefix("torch."),
            device,
            model.num_bytes / 1e6,
        )
        return model
    return load_checkpoint(
        folder,
        ops,
        device,
        dtype,
        adapter=adapter,
        merge_adapter=options.merge_adapter,
        check_finite=options.check_finite,
        quantization=quantization,
    )


def fit_kv_cache(options: LLMOptions, config: EngineConfig, model: Idefics2) -> EngineConfig:
    """Return ``config`` with the measured KV cache size, unless the caller has set one.

    Raises:
        ConfigError: The memory left is too small for one full sequence.
    """
    if model.device.type != "cuda" or options.kv_cache_tokens is not None:
        return config
    tokens = measured_kv_cache_tokens(model, config, options.gpu_memory_utilization)
    return replace(config, kv_cache_tokens=tokens)


def image_workers_on(
    device: torch.device, options: LLMOptions, processor: Processor
) -> WorkerPool | None:
    """Return the processes that decode images for a model on ``device``; ``None`` for threads.

    They are not started yet.
    """
    count = options.image_workers
    if count is None:
        count = default_workers() if device.type == "cuda" else 0
    if count == 0:
        return None
    rules = processor.tile_rules
    image_bytes = rules.image_config.tiles_per_image * aligned(rules.max_tile_bytes)
    pin = partial(pin_memory, device) if device.type == "cuda" else None
    return WorkerPool(count, image_bytes, pin=pin)


def at_least_one(name: str, value: int) -> int:
    """Return ``value``; raise ``ConfigError`` unless it is a positive integer."""
    number: int = check(name, value, Whole(1), ConfigError)
    return number
