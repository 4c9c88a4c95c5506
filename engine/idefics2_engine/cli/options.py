"""The options that commands share, and the objects made from them."""

import argparse
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import streams
from idefics2_engine.cli.structured import add_structured_options, structured_outputs
from idefics2_engine.errors import ImageError, SamplingError
from idefics2_engine.model.quantization import PARTS

if TYPE_CHECKING:
    from PIL.Image import Image

    from idefics2_engine import LLM, SamplingParams

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_FILTERS = ("top_p", "top_k", "min_p")
# Further answers to one prompt wait until others have ended
_MOST_AT_ONCE = 64
_MEDIA = ("image_policy", "max_image_pixels", "allowed_media_hosts")


def read_image(name: str, args: argparse.Namespace) -> "Image":
    """Read the image file or URL ``name``, or standard input for ``-``, by the rules of ``args``.

    Raises:
        ConfigError: A rule is invalid.
        ImageError: The image cannot be read, or the rules do not allow it.
    """
    from idefics2_engine.images.loader import load_image, media_config

    config = media_config(**media_settings(args))
    if name == "-":
        return load_image(streams.input_bytes(config.max_media_bytes, ImageError), config)
    if not name.strip():
        raise ImageError("image: must be the name of a file, got none")
    return load_image(os.path.expanduser(name), config)


def media_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rules for images that were given, by the names of ``LLM``'s arguments."""
    return {name: value for name in _MEDIA if (value := getattr(args, name)) is not None}


def folder_or_hub_id(text: str) -> Path | str:
    """Parse the name of a checkpoint: an existing folder, or an id on the hub.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    from idefics2_engine.checkpoint.hub import is_hub_id

    path = os.path.expanduser(text)
    if text and os.path.isdir(path):
        return Path(path)
    if is_hub_id(text) and not os.path.exists(path):
        return text
    raise argparse.ArgumentTypeError(
        f"no such folder, and no hub id (org/name or org/name@revision): {text!r}"
    )


def device(text: str) -> str:
    """Check the name of a device.

    Raises:
        argparse.ArgumentTypeError: It is not auto, cpu, cuda or cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def positive(text: str) -> int:
    """Parse a whole number from 1 to 9999.

    Raises:
        argparse.ArgumentTypeError: The text is not such a number.
    """
    if not re.fullmatch(r"[0-9]{1,4}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 9999, got {text!r}")
    return int(text)


def add_image_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--image``, which may be repeated, and the rules for images."""
    parser.add_argument(
        "--image",
        dest="images",
        metavar="FILE",
        action="append",
        default=[],
        help="an image to ask about, - for standard input; repeat it for several, in order",
    )
    add_media_options(parser)


def add_media_options(parser: argparse.ArgumentParser) -> None:
    """Add the rules for images."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--image-policy",
        choices=("parity", "correct", "strict"),
        help="how to read alpha, rotation, 16 bits and animations: as transformers (the default), "
        "as a viewer would, or not at all",
    )
    group.add_argument(
        "--max-image-pixels", metavar="N", type=int, help="largest width x height of an image"
    )
    group.add_argument(
        "--allow-host",
        dest="allowed_media_hosts",
        metavar="HOST",
        action="append",
        help="let images be https:// addresses on HOST; repeatable (default: none)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model that ``loaded_llm`` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        type=folder_or_hub_id,
        help="a checkpoint's folder, or its id on the hub: org/name or org/name@revision, taken "
        "from the hub's cache or downloaded (default: the demo checkpoint)",
    )
    add_loading_options(group)
    group.add_argument(
        "--merge-adapter",
        action=argparse.BooleanOptionalAction,
        help="merge the adapter into the weights, before quantization, or keep it unmerged "
        "(default: merged into 16-bit weights, unmerged beside weights in NF4)",
    )
    group.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="what to compute in (default: %(default)s)"
    )
    group.add_argument(
        "--quantization",
        choices=("nf4",),
        help="quantize linear layers to bitsandbytes' NF4, 4 bits a weight, while they are loaded",
    )
    add_quantization_options(group)
    group.add_argument(
        "--threads",
        metavar="N",
        type=positive,
        help="threads that compute on a CPU (default: OMP_NUM_THREADS, one for a small model, else "
        "torch's)",
    )
    group.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        help="also look at the four quarters of each image (default: what the checkpoint says)",
    )


def add_loading_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options for loading a checkpoint, which all commands with a model share."""
    group.add_argument(
        "--adapter",
        metavar="ADAPTER",
        type=folder_or_hub_id,
        help="a LoRA or DoRA adapter in PEFT's format: its folder or its id on the hub",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare the files with their checksums first: the hub's, or a SHA256SUMS file's "
        "beside them",
    )
    group.add_argument(
        "--check-finite",
        action="store_true",
        help="look at every weight for NaN, infinity and overflow",
    )
    group.add_argument(
        "--device",
        type=device,
        default="auto",
        help="auto (the default: a GPU if any), cpu, cuda, cuda:N",
    )


def add_quantization_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options for quantizing, except for the one that requests it."""
    group.add_argument(
        "--quantized-part",
        dest="quantized_parts",
        metavar="PART",
        choices=PARTS,
        action="append",
        help="quantize only this part's layers: vision, connector or text; repeatable (default: "
        "all three)",
    )
    group.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        help="keep the absolute maxima of blocks in 32 bit instead of quantizing them too",
    )


def import_engine() -> None:
    """Import the engine and torch, which may take longer than loading a model."""
    from idefics2_engine import LLM  # noqa: F401


@contextmanager
def loaded_llm(args: argparse.Namespace, answers: int = 1) -> "Iterator[LLM]":
    """Load the model in ``args`` for up to ``answers`` answers at a time, and close it at the end.

    Raises:
        Idefics2Error: An option or the checkpoint is invalid.
    """
    from idefics2_engine import LLM
    from idefics2_engine.cpu_threads import set_cpu_threads

    set_cpu_threads(model_folder(args.model), args.threads)
    with LLM(
        max_num_seqs=min(answers, _MOST_AT_ONCE),
        # Answers without --seed must differ between runs
        seed=secrets.randbits(63),
        **model_arguments(args),
    ) as llm:
        yield llm


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``LLM`` that ``args`` give for the model and its images."""
    return {
        "model": args.model,
        "adapter": args.adapter,
        "merge_adapter": args.merge_adapter,
        "verify": args.verify,
        "check_finite": args.check_finite,
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "quantized_parts": args.quantized_parts,
        "double_quant": args.double_quant,
        "split_images": args.split,
        **media_settings(args),
    }


def model_folder(model: Path | str | None) -> Path:
    """Return the folder of the model that ``--model`` names, after downloading it if necessary."""
    from idefics2_engine import llm_options

    return llm_options.model_folder(model, None)


def add_sampling_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Add the options that ``sampling_params`` reads, and return their group."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=256,
        help="most tokens in an answer (default: %(default)s)",
    )
    group.add_argument(
        "--min-tokens", metavar="N", type=int, default=0, help="fewest tokens in an answer"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 (the default) takes the likeliest token, above 0 draws one",
    )
    group.add_argument(
        "--top-p", metavar="P", type=float, help="draw from the likeliest tokens that sum to P"
    )
    group.add_argument("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens")
    group.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        help="draw from tokens at least P times as likely as the likeliest",
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="R",
        type=float,
        default=1.0,
        help="above 1, tokens seen before become less likely (default: %(default)s)",
    )
    group.add_argument("--seed", metavar="N", type=int, help="draw the same tokens each time")
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end the answer before TEXT; repeatable",
    )
    group.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        metavar="ID",
        type=int,
        action="append",
        default=[],
        help="end the answer at this token; repeatable",
    )
    add_structured_options(group)
    return group


def sampling_params(
    args: argparse.Namespace, n: int = 1, logprobs: int | None = None
) -> "SamplingParams":
    """Return the sampling parameters in ``args``, for ``n`` answers with ``logprobs``.

    Raises:
        SamplingError: A value is out of range, or has no effect without ``--temperature``.
    """
    from idefics2_engine import SamplingParams
    from idefics2_engine.structured.check import check_constraint

    filters = {name: value for name in _FILTERS if (value := getattr(args, name)) is not None}
    drawn = [*filters, *(["n above 1"] if n > 1 else [])]
    if drawn and args.temperature == 0:
        option = "--" + drawn[0].replace("_", "-")
        raise SamplingError(f"{option} has no effect without --temperature above 0")
    params = SamplingParams(
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_ids),
        n=n,
        logprobs=logprobs,
        structured_outputs=structured_outputs(args),
        **filters,
    )
    if params.constraint is not None:
        check_constraint(params.constraint)
    return params
