"""Running one path on all cases, to a recording on disk."""

import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from idefics2_engine import __version__
from idefics2_engine.device import torch_defaults, torch_device, torch_dtype
from idefics2_engine.errors import ConfigError
from idefics2_engine.model_files import printable_path
from idefics2_engine.parity.inner_stages import stages_of
from idefics2_engine.parity.inputs import Case
from idefics2_engine.parity.operations import (
    CalledOperations,
    check_swap,
    path_ops,
    replaced,
    swapped,
)
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.recording.case_recording import CaseRecording
from idefics2_engine.parity.recording.dump import Recording, write_recording
from idefics2_kernels import Ops

_logger = logging.getLogger(__name__)


@torch_defaults()
def record(
    path: Path,
    folder: pathlib.Path,
    cases: Sequence[Case],
    model_folder: pathlib.Path,
    *,
    device: str = "auto",
    max_tokens: int = 16,
    ops: Ops | None = None,
    swap: Sequence[str] = (),
    called: CalledOperations | None = None,
    order: Sequence[str] | None = None,
    digest: bool = False,
    label: str | None = None,
) -> Recording:
    """Run a path of ``ours`` or ``transformers`` on ``cases`` and write what it computed.

    Args:
        path: The path.
        folder: A new folder for the recording, or an empty one.
        cases: The inputs.
        model_folder: The checkpoint.
        device: Where to compute.
        max_tokens: Most tokens of an answer.
        ops: Operations in place of those that the path names.
        swap: Names of operations that are replaced by the reference's.
        called: Notes the operations that are called.
        order: Stages to record. If ``None``, all but those inside layers.
        digest: Whether only digests are kept.
        label: What its progress bar and the log call it. If ``None``, the path.

    Raises:
        Idefics2Error: The model, an input or an option is invalid.
    """
    check_swap(path, swap)
    found: Iterable[CaseRecording]
    about = {"swap": list(swap)} if swap else {}
    order = stages_of(model_folder) if order is None else list(order)
    if path.kind == "ours":
        from idefics2_engine.parity.recording.our_stages import record_ours

        own = swapped(ops or path_ops(path, torch_device(device)), swap)
        if ops is not None:
            others = replaced(path, ops, torch_device(device))
            about["replaced"] = [name for name in others if name not in swap]
        if called is not None:
            own = called.noting(own)
        found = record_ours(
            model_folder, path, cases, order, own, device=device, max_tokens=max_tokens
        )
    elif path.kind == "transformers":
        from idefics2_engine.parity.recording.transformers_stages import record_transformers

        found = record_transformers(
            model_folder, path, cases, order, device=device, max_tokens=max_tokens
        )
    else:
        raise ConfigError(f"a path must be ours or transformers to be recorded, got {path}")
    dtype = str(torch_dtype(path.dtype or "auto", torch_device(device))).removeprefix("torch.")
    found = _with_progress(found, len(cases), label or str(path))
    return _write(path, folder, model_folder, dtype, device, order, found, about, digest=digest)


@torch_defaults()
def record_reference(
    weights: Recording,
    folder: pathlib.Path,
    cases: Sequence[Case],
    answers: Recording,
    model_folder: pathlib.Path,
    *,
    device: str = "auto",
    in_float64: bool = True,
) -> Recording:
    """Run the reference with the weights and answers of other recordings.

    Args:
        weights: The recording whose dtype and quantization the weights have, and whose stages are
            recorded.
        folder: A new folder for the recording, or an empty one.
        cases: The inputs.
        answers: The recording whose answers are given to the model.
        model_folder: The checkpoint.
        device: Where to compute.
        in_float64: Whether to compute in float64, and not in the dtype of ``weights``.

    Raises:
        Idefics2Error: The model or an input is invalid, or is not that of ``answers``.
    """
    from idefics2_engine.parity.recording.reference_stages import record_forced

    if len(cases) != len(answers.cases):
        raise ConfigError(
            f"the inputs must be those of {answers.path}, wanted {len(answers.cases)} cases, "
            f"got {len(cases)}"
        )
    own = Path("ours", "reference", weights.dtype, weights.nf4)
    path = Path("float64") if in_float64 else own
    found = record_forced(
        model_folder, own, cases, answers.cases, weights.order, device=device, in_float64=in_float64
    )
    dtype = "float64" if in_float64 else weights.dtype
    found = _with_progress(found, len(cases), "float64" if in_float64 else f"{own} as yardstick")
    return _write(path, folder, model_folder, dtype, device, weights.order, found)


def _with_progress(
    found: Iterable[CaseRecording], count: int, label: str
) -> Iterator[CaseRecording]:
    """Yield cases while they are computed, below a progress bar if standard error is a terminal."""
    _logger.info("computing %s, %d case%s", label, count, "s" if count > 1 else "")
    yield from tqdm(found, label, count, unit="case", leave=False, disable=None, dynamic_ncols=True)


def _write(
    path: Path,
    folder: pathlib.Path,
    model_folder: pathlib.Path,
    dtype: str,
    device: str,
    order: Sequence[str],
    found: Iterable[CaseRecording],
    more: Mapping[str, Any] = MappingProxyType({}),
    *,
    digest: bool = False,
) -> Recording:
    about: dict[str, Any] = {
        "model": printable_path(model_folder),
        "device": str(torch_device(device)),
        "idefics2_engine": __version__,
        "torch": version("torch"),
    }
    if path.kind == "transformers":
        about["transformers"] = version("transformers")
    about |= more
    # The cases are computed while they are written
    with _without_tf32():
        return write_recording(
            folder, str(path), dtype, path.nf4, list(order), about, found, digest=digest
        )


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute fp32 in fp32. By default, cuDNN rounds convolutions of transformers to TF32."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
