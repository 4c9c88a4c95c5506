"""Parts of a job's fingerprint: what answers depend on beside the rows."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idefics2_engine import __version__
from idefics2_engine.checkpoint.checksums import known_checksums
from idefics2_engine.checkpoint.shards import ADAPTER_WEIGHTS, weight_paths
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model_files import open_file, paths_in, read_file
from idefics2_engine.sampling_params import SamplingParams

_TEXTS = ("*.json", "*.jinja")
# Two checkpoints of one architecture have equal headers and sizes, but not equal values
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_LENGTH_BYTES = 8


def checkpoint_parts(folder: Path) -> dict[str, Any]:
    """Return the identity of the checkpoint in ``folder``, without reading all of its weights.

    Raises:
        ConfigError: A file cannot be read.
        CheckpointError: Weights are missing or cannot be read.
    """
    return {"files": _text_parts(folder), "weights": _weight_parts(folder, weight_paths(folder))}


def adapter_parts(folder: Path | None) -> dict[str, Any] | None:
    """Return the identity of the adapter in ``folder``, raising as ``checkpoint_parts``."""
    if folder is None:
        return None
    return {
        "files": _text_parts(folder),
        "weights": _weight_parts(folder, [folder / ADAPTER_WEIGHTS]),
    }


def sampling_parts(params: SamplingParams) -> dict[str, Any]:
    """Return the sampling parameters of rows that have none."""
    parts = asdict(params)
    # JSON has no integers as keys
    if params.logit_bias is not None:
        parts["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    # Jobs that were begun before there were these parameters go on
    if params.structured_outputs is None:
        del parts["structured_outputs"]
    if params.prompt_logprobs_start == 0:
        del parts["prompt_logprobs_start"]
    return parts


def version_parts() -> dict[str, Any]:
    """Return the version of the engine."""
    return {"engine": __version__}


def _text_parts(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of config, tokenizer, chat template and so on by file name."""
    return {
        path.name: hashlib.sha256(read_file(path)).hexdigest() for path in paths_in(folder, *_TEXTS)
    }


def _weight_parts(folder: Path, paths: list[Path]) -> Mapping[str, Any]:
    sums = known_checksums(folder, paths)
    return {
        path.name: _sampled(path) | ({"published": sums[path.name]} if path.name in sums else {})
        for path in paths
    }


def _sampled(path: Path) -> dict[str, Any]:
    """Return size and hashes of the header and of samples of the values in a safetensors file."""
    with open_file(path, CheckpointError) as (file, size):
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(min(length, size))
        samples = hashlib.sha256()
        begin = file.tell()
        step = max(1, (size - begin) // _SAMPLES)
        for place in range(begin, size, step):
            file.seek(place)
            samples.update(file.read(min(_SAMPLE_BYTES, step)))
    return {
        "size": size,
        "header": hashlib.sha256(header).hexdigest(),
        "samples": samples.hexdigest(),
    }
