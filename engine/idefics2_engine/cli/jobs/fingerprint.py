"""The fingerprint of a job that the command line describes."""

import argparse
from dataclasses import asdict
from typing import Any

from idefics2_engine.cli import options
from idefics2_engine.images.loader import MAX_BYTES, MAX_PIXELS
from idefics2_engine.jobs.fingerprint_parts import (
    adapter_parts,
    checkpoint_parts,
    sampling_parts,
    version_parts,
)
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.writers.row_output import SaveOptions
from idefics2_engine.sampling_params import SamplingParams


def fingerprint_parts(
    args: argparse.Namespace, job_input: JobInput, params: SamplingParams, save: SaveOptions
) -> dict[str, Any]:
    """Return everything that the output depends on beside the content of the input files.

    Raises:
        ConfigError: The model or the device is not there.
        CheckpointError: Weights are missing or cannot be read.
    """
    from idefics2_engine.checkpoint.hub import find_adapter

    return {
        "model": checkpoint_parts(options.model_folder(args.model)),
        "adapter": adapter_parts(None if args.adapter is None else find_adapter(args.adapter)),
        "engine": _engine_parts(args),
        "images": {
            "policy": args.image_policy or "parity",
            "max_pixels": args.max_image_pixels or MAX_PIXELS,
            "max_bytes": args.max_media_bytes or MAX_BYTES,
            "split": args.split,
            "root": str(job_input.media_root.resolve()),
            "hosts": sorted(args.allowed_media_hosts or ()),
        },
        "sampling": sampling_parts(params),
        "input": job_input.fingerprint_parts(),
        "output": {
            "format": args.output_format,
            "save": asdict(save),
            **({} if args.on_incomplete == "error" else {"on_incomplete": args.on_incomplete}),
        },
        "version": version_parts(),
    }


def device_name(args: argparse.Namespace) -> str:
    """Return the kind of the device: ``cpu``, or the name of the GPU."""
    import torch

    from idefics2_engine.device import torch_device

    device = torch_device(args.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _engine_parts(args: argparse.Namespace) -> dict[str, Any]:
    from idefics2_engine.device import torch_device, torch_dtype

    device = torch_device(args.device)
    on_cpu = "row by row" if args.deterministic else "reference"
    return {
        "device": device_name(args),
        "ops": "triton" if device.type == "cuda" else on_cpu,
        "dtype": str(torch_dtype(args.dtype, device)).removeprefix("torch."),
        "quantization": args.quantization,
        "quantized_parts": args.quantized_parts,
        "double_quant": args.double_quant,
        **({} if args.merge_adapter is None else {"merge_adapter": args.merge_adapter}),
        "max_model_len": args.max_model_len,
        "sampling_order": args.sampling_order or "vllm",
        "seed": args.seed or 0,
        "deterministic": args.deterministic,
    }
