"""Time decode steps in NF4 without and with an adapter beside the weights, and ``lora_linear``.

    PYTHONPATH=engine:kernels:bench python scratch/lora_gpu.py --json lora.json

Steps are those of the 8B shape with random weights, in a CUDA graph each: 1, 32 and 128 sequences
after 1,088 tokens. The adapter has rank 8 on all projections of the text model. ``lora_linear`` is
checked against float64 and timed beside the base's product alone, cuBLAS on 16 bits, and PEFT's way
on bitsandbytes. ``--dry`` runs the same on a CPU: the demo checkpoint's steps, and small cases in
Triton's interpreter (with TRITON_INTERPRET=1).
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from idefics2_bench import machine
from idefics2_bench.kernels import bench_case
from idefics2_bench.steps.model_steps import model_step
from idefics2_bench.timing import alternate, measure, num_copies
from idefics2_engine.checkpoint.loader import build_model
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.jobs.plan.latency_case import latency_case
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import NF4Linear, SideBySide
from idefics2_engine.model.low_rank import LowRank
from idefics2_engine.model.quantization import Quantization
from idefics2_kernels import REFERENCE, TRITON
from idefics2_kernels.catalog import CATALOG
from idefics2_kernels.catalog.criterion import case_error

FOLDER = Path(__file__).parents[1] / "tests/data/idefics2-8b"
RANK = 8
SPEC = next(spec for spec in CATALOG if spec.name == "lora_linear")
ROWS = ("m1", "m32", "m128", "m2048")


def add_adapter(model: Idefics2) -> int:
    """Add random changes of rank ``RANK`` to all projections of the text model; return their bytes."""
    parts = {"qkv_proj": None, "o_proj": 1, "gate_up_proj": 2, "down_proj": 1}
    config, total = model.config.text, 0
    kv = config.num_kv_heads * config.head_dim
    for name, layer in list(model.text.named_modules()):
        if not isinstance(layer, NF4Linear | SideBySide) or ".layers." in name.partition("proj")[2]:
            continue
        N, K = layer.shape
        count = parts[name.rpartition(".")[2]]
        widths = [N - 2 * kv, kv, kv] if count is None else [N // count] * count
        changes, first = [], 0
        for width in widths:
            a = torch.randn(RANK, K, device=model.device, dtype=model.dtype) * K**-0.5
            b = torch.randn(width, RANK, device=model.device, dtype=model.dtype) * 0.01
            changes.append((first, a, b))
            first += width
        layer.low_rank = LowRank.combine((N, K), changes)
        total += sum(parameter.nbytes for parameter in layer.low_rank.parameters())
    return total


def steps(names: list[str], dry: bool) -> list[dict[str, Any]]:
    """Time the steps called ``names`` without and with an adapter."""
    device = torch.device("cpu" if dry else "cuda")
    config = ModelConfig.load(DEMO_MODEL if dry else FOLDER)
    # The vision tower is not in these steps
    config = replace(config, vision=replace(config.vision, num_layers=1))
    dtype = torch.float32 if dry else torch.bfloat16
    model = build_model(config, REFERENCE if dry else TRITON, device, dtype, Quantization())
    model.init_weights()
    # The twin shares the weights
    adapted = model.with_ops(model.ops)
    nbytes = add_adapter(adapted)
    rows = []
    with torch.inference_mode():
        for name in names:
            calls: dict[str, Any] = {
                "nf4": model_step(latency_case(name), model),
                "nf4-adapter": model_step(latency_case(name), adapted),
            }
            finite = all(bool(torch.isfinite(call()).all()) for call in calls.values())
            assert finite, f"{name}: not finite"
            if dry:
                times = alternate(calls, 3, 1, device)
            else:
                times = measure({key: [call] for key, call in calls.items()})
            for key, found in times.items():
                rows.append({"kernel": "step", "case": name, "impl": key, **asdict(found)})
            over = times["nf4-adapter"].ms / times["nf4"].ms
            rows[-1] |= {"over": over, "adapter_MB": nbytes / 1e6}
            print(f"{name}: {times['nf4'].ms:.3f} ms, with an adapter {over:.3f} x", flush=True)
    return rows


def cases(dry: bool) -> list[dict[str, Any]]:
    """Check and time the cases of ``lora_linear``."""
    if dry:
        for case in [case for case in SPEC.cases if case.where == "any"][:6]:
            error = case_error(SPEC, "triton", case, SPEC.make_inputs(case, torch.device("cpu")))
            print(f"lora_linear {case.name}: {error:.2f} of the allowed error")
        return []
    about = machine.describe()
    rows = []
    for case in SPEC.cases:
        if case.where != "model" or not case.name.endswith(ROWS):
            continue
        copies = num_copies(SPEC.cost(case).bytes)
        found = bench_case(SPEC, ["triton"], case, about, torch.device("cuda"), copies)
        sets = [SPEC.make_inputs(case, torch.device("cuda")) for _ in range(copies)]
        alone = measure(
            {"base": [lambda one=one: TRITON.nf4_matmul(one["x"], one["base"]) for one in sets]}
        )["base"]
        found.append({"kernel": "lora_linear", "case": case.name, "impl": "base", **asdict(alone)})
        rows += found
        ours = found[0]
        print(
            f"{case.name}: {1e3 * ours.get('ms', 0):.1f} us, base alone {1e3 * alone.ms:.1f} us, "
            f"{ours.get('speedup', 0):.2f} x {ours.get('peer')}, error {ours['error']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Run both and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    begin = time.perf_counter()
    names = ["decode-b1-s20", "decode-b3-s20"] if options.dry else []
    names = names or ["decode-b1", "decode-b32", "decode-b128"]
    rows = steps(names, options.dry)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    rows += cases(options.dry)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
