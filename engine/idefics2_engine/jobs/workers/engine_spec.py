"""What a worker builds its engine from: plain data, so that the parent needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.workers.worker_place import WorkerPlace
from idefics2_engine.runtime.config import default_num_seqs

LLM_NAME = "idefics2_engine.llm:LLM"
_MOST_IMAGE_PROCESSES = 8


@dataclass(frozen=True)
class EngineSpec:
    """An engine as data that can be pickled.

    Attributes:
        arguments: Keyword arguments of ``LLM``, or of another function that builds an engine.
        engine: Dotted name of that function, ``package.module:name``. The ``request_id`` of its
            engine's outputs is the row's place, as in ``LLM.iterate``.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    engine: str = LLM_NAME

    @property
    def device(self) -> str:
        """The device as an argument of ``LLM``."""
        return str(self.arguments.get("device", "auto"))

    def max_num_seqs(self, *, on_gpu: bool) -> int:
        """Return the answers that one engine generates at once."""
        given = self.arguments.get("max_num_seqs")
        return default_num_seqs(on_gpu=on_gpu) if given is None else int(given)


def build_engine(spec: EngineSpec, place: WorkerPlace) -> RowEngine:
    """Build the engine in a worker at ``place``.

    Raises:
        ConfigError: An argument or the checkpoint is invalid.
        CheckpointError: The weights are.
    """
    if spec.engine != LLM_NAME:
        engine: RowEngine = resolve_name(spec.engine)(**spec.arguments)
        return engine
    return _build_llm(dict(spec.arguments), place)


def _build_llm(arguments: dict[str, Any], place: WorkerPlace) -> RowEngine:
    import torch

    from idefics2_engine.cpu_threads import share_cpu_threads
    from idefics2_engine.llm import LLM
    from idefics2_engine.llm_options import model_folder

    if arguments.get("load_format") == "dummy":
        torch.set_num_threads(place.threads)
    else:
        folder = model_folder(arguments.get("model"), arguments.get("revision"))
        share_cpu_threads(folder, place.threads)
    # Every process would otherwise read images on all cores
    if arguments.get("image_threads") is None:
        arguments["image_threads"] = min(place.threads, _MOST_IMAGE_PROCESSES)
    if place.device is not None:
        if arguments.get("image_workers") is None:
            arguments["image_workers"] = max(1, min(place.threads - 1, _MOST_IMAGE_PROCESSES))
        if str(arguments.get("device", "auto")).startswith("cuda:"):
            # The only device that is visible here
            arguments["device"] = "cuda"
    if place.sharers > 1 and torch.cuda.is_available():
        whole = float(arguments.get("gpu_memory_utilization", 0.9))
        free, total = torch.cuda.mem_get_info()
        arguments["gpu_memory_utilization"] = memory_share(whole, place.sharers, free, total)
    return LLM(**arguments)


def memory_share(utilization: float, sharers: int, free: int, total: int) -> float:
    """Return ``gpu_memory_utilization`` for one of several engines on a device.

    The engine counts the memory of other processes as its own, so what is used already is added.

    Args:
        utilization: Share of the device's memory for all engines together.
        sharers: Engines on the device.
        free: Bytes that are free before the engine is built.
        total: Bytes of the device.
    """
    return min(utilization, (total - free) / total + utilization / sharers)
