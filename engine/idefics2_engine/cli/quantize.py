"""The command ``idefics2 quantize``, which converts a checkpoint to NF4 in bitsandbytes' format."""

import argparse
import os
from pathlib import Path
from typing import Any

from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.checkpoint.hub import find_adapter, find_model
from idefics2_engine.checkpoint.shards import ADAPTER_WEIGHTS, weight_paths
from idefics2_engine.cli import options
from idefics2_engine.cli.log_output import add_log_options
from idefics2_engine.errors import ConfigError
from idefics2_engine.model.quantization import Quantization


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint with its weights in 4 bits",
        description="Quantize the linear layers of a checkpoint to bitsandbytes' NF4 and write it "
        "to a new folder, for this engine and for transformers. Embeddings, norms and the head "
        "keep --dtype.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        type=options.folder_or_hub_id,
        help="a checkpoint that is not quantized: its folder, or its id on the hub",
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="a new folder, or an empty one")
    options.add_loading_options(parser.add_argument_group("model"))
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="what all else is kept in, and quantized from (default: %(default)s)",
    )
    options.add_quantization_options(parser.add_argument_group("quantization"))
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint, print its size in MB, and return the exit code.

    Raises:
        Idefics2Error: The target is not empty, or an option, the checkpoint or the adapter is
            invalid.
    """
    target = Path(os.path.expanduser(args.target))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: must be a new folder or an empty one")
    from idefics2_engine.checkpoint.loader import load_checkpoint
    from idefics2_engine.checkpoint.writer import save_checkpoint
    from idefics2_engine.device import torch_device, torch_dtype

    source = find_model(args.source)
    adapter = None if args.adapter is None else find_adapter(args.adapter)
    if args.verify:
        verify_files(source, weight_paths(source))
        if adapter is not None:
            verify_files(adapter, [adapter / ADAPTER_WEIGHTS])
    device = torch_device(args.device)
    model = load_checkpoint(
        source,
        device=device,
        dtype=torch_dtype(args.dtype, device),
        adapter=adapter,
        # The new checkpoint has no place for an unmerged adapter
        merge_adapter=True,
        check_finite=args.check_finite,
        quantization=Quantization.from_arguments("nf4", args.quantized_parts, args.double_quant),
    )
    save_checkpoint(model, target, config_from=source)
    before, after = (
        sum(path.stat().st_size for path in weight_paths(folder)) for folder in (source, target)
    )
    print(f"{target}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")
    return 0
