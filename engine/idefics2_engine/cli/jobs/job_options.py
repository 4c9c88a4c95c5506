"""The options of jobs, which ``idefics2 run`` and ``idefics2 plan`` share, and their objects."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options
from idefics2_engine.jobs.readers.input_options import FORMATS, InputOptions
from idefics2_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from idefics2_engine.images.loader import MediaConfig

_CHECKS = ("none", "exists", "header")
_MEDIA = (
    "image_policy",
    "max_image_pixels",
    "max_media_bytes",
    "allowed_media_hosts",
    "media_timeout",
    "image_threads",
)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``input_options`` reads, and ``--check-images``."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "-i",
        "--input",
        dest="inputs",
        metavar="IN",
        action="append",
        help="a file of rows, a folder, a glob pattern, an address at s3:// or gs://, "
        "hf:org/name:split, or - for standard input; repeat it for several, which are read in the "
        "order of their names",
    )
    group.add_argument(
        "--input-format",
        choices=FORMATS,
        help="format of the input (default: auto, by its name and, for JSONL, the first row)",
    )
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="ask this of every row; {name} is replaced by the row's column of this name",
    )
    group.add_argument("--prompt-template", metavar="FILE", help="a file with the text of --prompt")
    for name, default in (
        ("image", "images; in a table also image"),
        ("prompt", "prompt"),
        ("messages", "messages"),
        ("id", "id"),
    ):
        group.add_argument(
            f"--{name}-column", metavar="COL", help=f"column of the {name} (default: {default})"
        )
    group.add_argument("--keep", metavar="COL,…", type=names, help="columns to carry to the output")
    group.add_argument("--limit", metavar="N", type=int, help="only the first N rows")
    group.add_argument("--sample", metavar="N", type=int, help="only N rows, chosen at random")
    group.add_argument(
        "--sample-seed",
        metavar="N",
        type=int,
        help="determines which rows --sample chooses (default: 0)",
    )
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="only every N-th row from row I, counted from 0; auto is the task of a Slurm array",
    )
    group.add_argument(
        "--on-duplicate-id",
        choices=("error", "suffix"),
        help="end at a repeated id (error, the default), or add a suffix to it",
    )
    group.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder from which rows may name images (default: the folder of the input)",
    )
    group.add_argument(
        "--hash-media",
        action="store_true",
        default=None,
        help="identify images by their content, not by size and time of change",
    )
    group.add_argument(
        "--check-model", metavar="NAME", help="refuse OpenAI batch lines that name another model"
    )
    group.add_argument(
        "--check-images",
        choices=_CHECKS,
        default="exists",
        help="what to look at in images before the model is loaded: nothing, whether the files are "
        "there and allowed, or also their headers (default: %(default)s)",
    )


def input_options(args: argparse.Namespace) -> InputOptions:
    """Return the options of reading; raise ``ConfigError`` if one is invalid."""
    return InputOptions(**given(args, InputOptions))


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, which ``job_sampling`` reads."""
    group = options.add_sampling_options(parser)
    group.add_argument(
        "--n", metavar="N", type=int, default=1, help="answers to each row (default: %(default)s)"
    )
    group.add_argument(
        "--logprobs",
        metavar="K",
        type=int,
        help="compute each token's log probability and those of the K likeliest, for --save",
    )


def job_sampling(args: argparse.Namespace) -> SamplingParams:
    """Return the parameters of rows that have none; ``--seed`` is the job's, not a row's."""
    without_seed = argparse.Namespace(**(vars(args) | {"seed": None}))
    return options.sampling_params(without_seed, n=args.n, logprobs=args.logprobs)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model and of its engine, which ``llm_arguments`` reads."""
    options.add_model_options(parser)
    options.add_media_options(parser)
    group = parser.add_argument_group("engine")
    for name, metavar, kind, text in (
        ("max-model-len", "N", int, "tokens of a prompt with its answer (default: the model's)"),
        (
            "max-num-seqs",
            "N",
            int,
            "answers that are generated at once (default: 256 on a GPU, 64 on a CPU)",
        ),
        ("max-num-batched-tokens", "N", int, "tokens of a forward pass (default: 8192)"),
        ("kv-cache-tokens", "N", int, "size of the KV cache (default: what the memory allows)"),
        ("gpu-memory-utilization", "F", float, "share of the GPU's memory to use (default: 0.9)"),
        ("max-media-bytes", "N", int, "largest image file (default: 256 MiB)"),
        ("media-timeout", "S", float, "seconds that a download may take (default: 20)"),
        ("image-threads", "N", int, "images that are read at once (default: cores, at most 8)"),
        ("image-workers", "N", int, "processes that decode images (default: by the device)"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, type=kind, help=text)
    group.add_argument(
        "--sampling-order",
        choices=("vllm", "hf"),
        help="min-p before top-k and top-p (vllm, the default) or after them (hf)",
    )


def job_media(args: argparse.Namespace, media_root: Path) -> "MediaConfig":
    """Return the rules for the images of a job, those of its engine.

    Raises:
        ConfigError: A value is invalid.
    """
    from idefics2_engine.images.loader import media_config

    arguments = llm_arguments(args)
    rules = {name: arguments[name] for name in _MEDIA if name in arguments}
    return media_config(**rules, allowed_media_root=media_root)


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of ``LLM``, without those for which it has a default."""
    sizes = {
        name: value
        for name in (
            "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens",
            "gpu_memory_utilization", "max_media_bytes", "media_timeout", "image_threads",
            "image_workers", "sampling_order",
        )
        if (value := getattr(args, name)) is not None
    }  # fmt: skip
    return options.model_arguments(args) | sizes | {"seed": args.seed or 0}


def names(text: str) -> tuple[str, ...]:
    """Parse names that are separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def given(args: argparse.Namespace, kind: Callable[..., Any]) -> dict[str, Any]:
    """Return the fields of the dataclass ``kind`` that ``args`` give."""
    return {
        field.name: value
        for field in fields(kind)  # type: ignore[arg-type]
        if (value := getattr(args, field.name, None)) is not None
    }
