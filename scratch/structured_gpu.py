"""Figures of structured output on a GPU, at the 8B shape with random weights.

    PYTHONPATH=engine:kernels:bench python scratch/structured_gpu.py --json out.json
    python scratch/structured_gpu.py --free-only   # on another commit: steps without constraints

It takes llguidance from the wheel beside it if it is not installed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SHORT, LONG = 8, 64


def find_llguidance():
    try:
        import llguidance  # noqa: F401
    except ImportError:
        (wheel,) = HERE.glob("llguidance-*.whl")
        folder = tempfile.mkdtemp()
        zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, folder)


def schema():
    kinds = (
        {"enum": ["low", "medium", "high"]},
        {"type": "integer", "minimum": 0, "maximum": 999},
        {"type": "boolean"},
    )
    names = (
        "image_quality",
        "number_of_objects",
        "has_text",
        "main_color_temperature",
        "number_of_people",
        "is_outdoors",
        "level_of_detail",
        "estimated_year",
        "is_photograph",
        "amount_of_motion",
        "number_of_colors",
        "needs_review",
    )
    keys = {name: kinds[i % 3] for i, name in enumerate(names)}
    keys["main_color_temperature"] = {"enum": ["cold", "neutral", "warm"]}
    return {
        "type": "object",
        "properties": keys,
        "required": list(keys),
        "additionalProperties": False,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="tests/data/idefics2-8b")
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--free-only", action="store_true")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    batches = [int(one) for one in options.batches.split(",")]
    from idefics2_engine import LLM, SamplingParams

    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    begin = time.perf_counter()
    llm = LLM(
        options.folder,
        load_format="dummy",
        device=options.device,
        max_model_len=512,
        max_num_seqs=max(batches),
        max_num_batched_tokens=2048,
        kv_cache_tokens=512 * max(batches),
        enable_prefix_caching=False,
    )
    found = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "load_seconds": time.perf_counter() - begin,
        "steps": [],
    }
    print(found, flush=True)

    def ran(count, params):
        """Return wall seconds, forward passes, tokens and forced tokens of ``count`` requests."""
        prompts = [{"prompt_token_ids": [1, *range(300 + i, 316 + i)]} for i in range(count)]
        before = replace(llm.stats)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        errors = [output.error for output in outputs if output.error]
        assert not errors, errors[0]
        after = llm.stats
        forced = getattr(after, "forced_tokens", 0) - getattr(before, "forced_tokens", 0)
        return (
            seconds,
            after.steps - before.steps,
            after.generated_tokens - before.generated_tokens,
            forced,
            outputs,
        )

    def params(kind, tokens):
        if kind == "free":
            return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return SamplingParams(temperature=0.0, max_tokens=tokens, structured_outputs=constraint)

    def step_ms(kind, count):
        times = {tokens: ran(count, params(kind, tokens)) for tokens in (SHORT, LONG)}
        passes = times[LONG][1] - times[SHORT][1]
        return 1e3 * (times[LONG][0] - times[SHORT][0]) / passes

    kinds = ["free"]
    constraint = None
    if not options.free_only:
        find_llguidance()
        from idefics2_engine import StructuredOutputsParams
        from idefics2_engine.scheduling.sequence import Sequence

        constraint = StructuredOutputsParams(json=schema())
        kinds = ["free", "constrained", "constrained, each step read first"]
        append_forced = Sequence.append_forced
        begin = time.perf_counter()
        ran(1, params("constrained", 2))
        found["first_constraint_seconds"] = time.perf_counter() - begin
    ahead = llm.engine.config

    def configured(kind):
        """Let the engine run ahead, or read each step before the next one."""
        llm.engine.config = replace(ahead, run_ahead=ahead.run_ahead and "read first" not in kind)
        if constraint is not None:
            Sequence.append_forced = lambda self: 0

    for count in batches:
        samples = {kind: [] for kind in kinds}
        for round_ in range(options.rounds + 1):
            for kind in kinds:
                configured(kind)
                ms = step_ms("free" if kind == "free" else "constrained", count)
                if round_:
                    samples[kind].append(ms)
        row = {"batch": count}
        for kind, ms in samples.items():
            row[kind] = {"ms": statistics.median(ms), "min": min(ms), "max": max(ms)}
            if kind != "free":
                row[kind]["slower"] = row[kind]["ms"] / row["free"]["ms"] - 1
        found["steps"].append(row)
        print(json.dumps(row), flush=True)
        if constraint is not None:
            llm.engine.config = ahead
            Sequence.append_forced = append_forced
            forced = ran(count, params("constrained", 400))
            Sequence.append_forced = lambda self: 0
            drawn = ran(count, params("constrained", 400))
            Sequence.append_forced = append_forced
            texts = [[output.outputs[0].token_ids for output in one[4]] for one in (forced, drawn)]
            row["whole"] = {
                "tokens_a_sequence": forced[2] / count,
                "passes": forced[1],
                "tokens_a_sequence_and_pass": forced[2] / count / forced[1],
                "forced_share": forced[3] / forced[2],
                "seconds": forced[0],
                "seconds_without_forced": drawn[0],
                "passes_without_forced": drawn[1],
                "same_tokens": sum(a == b for a, b in zip(*texts, strict=True)) / count,
                "answer": forced[4][0].outputs[0].text,
                "ends": forced[4][0].outputs[0].finish_reason,
            }
            print(json.dumps(row["whole"]), flush=True)
    if on_gpu and not options.free_only:
        found["kernel_us"] = {rows: kernel_us(rows) for rows in (1, 32, 128)}
        print(found["kernel_us"])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    llm.close()


def kernel_us(rows, V=32003, calls=200):
    """Return the time of the mask kernel in a CUDA graph, on logits that move through memory."""
    from idefics2_kernels import TRITON

    width = -(-V // 64) * 64
    buffers = [
        torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)[:, :V] for _ in range(20)
    ]
    places = torch.arange(rows, device="cuda")
    bits = torch.zeros(rows, -(-V // 32), dtype=torch.int32, device="cuda")
    TRITON.apply_bitmask(buffers[0], places, bits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            TRITON.apply_bitmask(buffers[call % 20], places, bits)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


if __name__ == "__main__":
    main()
