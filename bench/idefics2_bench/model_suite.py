"""Options and helpers that the benchmarks of the whole model share."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from idefics2_bench import machine, report, transformers_peer
from idefics2_bench.results.page import add_report_option, write_report
from idefics2_engine import LLM
from idefics2_engine.checkpoint.hub import find_model
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.jobs.plan.device_rates import PEER
from idefics2_engine.llm_options import LLMOptions, load_model
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_kernels import REFERENCE, TRITON, Ops


@dataclass(frozen=True)
class LoadedModel:
    """The parts of an ``LLM`` that need no KV cache, to keep when it is closed."""

    model: Idefics2
    config: ModelConfig
    processor: Processor
    engine_config: EngineConfig

    @classmethod
    def of(cls, llm: LLM) -> "LoadedModel":
        """Take the parts of ``llm``."""
        return cls(llm.model, llm.config, llm.processor, llm.engine_config)


Loaded = LLM | LoadedModel


def parser(
    suite: str, description: str | None, *, has_peer: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of ``idefics2 bench <suite>``, for ``resolve`` and ``load``."""
    parser = argparse.ArgumentParser(
        prog=f"idefics2 bench {suite}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", help="a checkpoint's folder or hub id (default: the demo checkpoint)"
    )
    which.add_argument(
        "--random-weights",
        type=Path,
        metavar="FOLDER",
        help="draw weights on the device for the config, tokenizer and processor files in FOLDER",
    )
    add("--device", default="auto", help="auto (the default: a GPU if any), cpu or cuda")
    add("--dtype", default="auto", help="auto (the default): bfloat16 on a GPU, float32 on a CPU")
    add("--ops", choices=("triton", "reference"), help="default: triton on a GPU, else reference")
    add(
        "--quantization",
        choices=("nf4",),
        help="quantize linear layers; nothing is timed beside it, as the peer would need weights "
        "of its own",
    )
    if has_peer:
        peer = parser.add_mutually_exclusive_group()
        peer.add_argument(
            "--peer",
            choices=(PEER,),
            help="what to time beside it, on the same weights (default: transformers, if installed)",
        )
        peer.add_argument("--no-peer", action="store_true", help="time nothing beside it")
    else:
        parser.set_defaults(peer=None, no_peer=True)
    add("--json", type=Path, help="file to write the rows to; rows there of other cases are kept")
    add_report_option(parser)
    add("--commit", help="what to record as the commit, where there is no git")
    return parser


def resolve(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set the device, the operations and the peer that ``options`` leave to defaults.

    Options that contradict each other end the program through ``parser.error``.
    """
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.ops is None:
        options.ops = "triton" if options.device.startswith("cuda") else "reference"
    if options.peer == PEER and not transformers_peer.is_installed():
        parser.error("--peer transformers: it is not installed")
    if options.peer == PEER and options.quantization:
        parser.error("--peer transformers: it cannot be given weights in NF4")
    wanted = not options.no_peer and not options.quantization
    if options.peer is None and wanted and transformers_peer.is_installed():
        options.peer = PEER


def about(options: argparse.Namespace) -> dict[str, object]:
    """Return ``machine.describe``, with the commit of ``--commit`` if given."""
    described = machine.describe(options.device)
    return {**described, "commit": options.commit} if options.commit else described


def print_table(
    options: argparse.Namespace, about: dict[str, object], rows: list[dict[str, Any]]
) -> None:
    """Print ``rows`` as a table, and write the page of ``--report`` if it is wanted."""
    print()
    print(report.whole_table(about, rows))
    write_report(options.report, about, rows)


def folder(options: argparse.Namespace) -> Path:
    """Return the folder of the model's files."""
    if options.random_weights is not None:
        return Path(options.random_weights)
    return DEMO_MODEL if options.model is None else find_model(options.model)


def load(options: argparse.Namespace, **settings: Any) -> LLM:
    """Build the model of ``options`` with ``settings`` of ``LLM``; by default, images are whole."""
    return LLM(
        folder(options),
        load_format="auto" if options.random_weights is None else "dummy",
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        ops=TRITON if options.ops == "triton" else REFERENCE,
        **{"split_images": False, **settings},
    )


def load_network(options: argparse.Namespace, ops: Ops) -> Idefics2:
    """Build the model of ``options`` alone, without an engine, with ``ops``."""
    path = folder(options)
    settings = LLMOptions(
        model=path,
        load_format="auto" if options.random_weights is None else "dummy",
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        ops=ops,
    )
    device, config = torch.device(options.device), ModelConfig.load(path)
    return load_model(settings, config, device, path, None, settings.to_quantize)


@contextmanager
def watched_logits(engine: Engine) -> Iterator[list[Tensor]]:
    """Yield a list to which each step of ``engine`` appends a copy of its logits (rows, V)."""
    seen: list[Tensor] = []
    run = engine.runner.run

    def watch(*arguments: Any) -> Any:
        found = run(*arguments)
        # A copy is needed, because the sampler bars tokens in the logits themselves
        seen.append(found[0].clone())
        return found

    with patch.object(engine.runner, "run", watch):
        yield seen


def case_name(name: str, options: argparse.Namespace) -> str:
    """Return the name of case ``name`` in a row. Quantized weights add a suffix."""
    return f"{name}-{options.quantization}" if options.quantization else name


def settings_of(llm: LLM, options: argparse.Namespace) -> dict[str, str]:
    """Return the name and the dtype of the model for a row."""
    return network_settings(llm.model, options)


def network_settings(model: Idefics2, options: argparse.Namespace) -> dict[str, str]:
    """Return the name and the dtype of the model for a row."""
    weights = options.random_weights or options.model or "demo"
    name = Path(weights).name if Path(weights).is_dir() else str(weights)
    kind = " (random weights)" if options.random_weights is not None else ""
    return {"model": f"{name}{kind}", "dtype": str(model.dtype).removeprefix("torch.")}


def memory_of(llm: LLM) -> dict[str, float]:
    """Return the memory of the weights, and on a GPU all allocated memory, in GB (10^9 bytes)."""
    memory = {"weights_GB": llm.model.num_bytes / 1e9}
    if llm.model.device.type == "cuda":
        memory["allocated_GB"] = torch.cuda.memory_allocated(llm.model.device) / 1e9
    return memory
