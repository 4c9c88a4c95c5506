"""Marks of `generate` in transformers' loop: transformers' sdpa against our class with its cache.

PYTHONPATH=engine:kernels:bench python scratch/hf_cache_marks.py            on a GPU, below 2 minutes
PYTHONPATH=engine:kernels:bench python scratch/hf_cache_marks.py --small    dry run on a CPU
"""

import argparse
import copy
import cProfile
import io
import json
import pstats
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from idefics2_bench.transformers_peer import generate
from idefics2_engine.hf import accelerate_model

SMALL = {
    "vision_config": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1,
                      "num_attention_heads": 3, "image_size": 112, "patch_size": 14},
    "perceiver_config": {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1,
                         "resampler_n_heads": 4, "resampler_head_dim": 16,
                         "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "text_config": {"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96,
                    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "vocab_size": 160, "sliding_window": 4096, "pad_token_id": 0},
}  # fmt: skip


def build(small: bool, device: str) -> tuple[Any, Any]:
    """Return transformers' model with random weights, and ours with the same parameters."""
    values = SMALL
    if not small:
        values = json.loads(Path("tests/data/idefics2-8b/config.json").read_text())
        values["perceiver_config"]["rms_norm_eps"] = 1e-5
    config = transformers.Idefics2Config(**values)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    start = time.perf_counter()
    with torch.device("meta"):
        peer: Any = transformers.Idefics2ForConditionalGeneration._from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    # Buffers are made anew, the parameters are drawn below
    peer.to_empty(device=device)
    rotary = peer.model.text_model.rotary_emb
    peer.model.text_model.rotary_emb = type(rotary)(config.text_config).to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
    peer.tie_weights()
    peer.eval().requires_grad_(False)
    shared = {id(p): p for p in [*peer.parameters(), *peer.buffers()]}
    own = accelerate_model(copy.deepcopy(peer, shared))
    assert next(own.parameters()).data_ptr() == next(peer.parameters()).data_ptr()
    print(f"models: {time.perf_counter() - start:.1f} s", flush=True)
    return peer, own


def timed(model: Any, inputs: dict[str, torch.Tensor], new: int, device: str) -> Any:
    """Return the tokens, the seconds and the peak memory in GB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tokens = generate(model, inputs, 0, new)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return tokens, seconds, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0


def compare(peer: Any, own: Any, inputs: Any, theirs: Any, ours: Any) -> None:
    """Say how many rows differ, and whether the first different tokens of a row are a near tie."""
    differ = (theirs != ours).any(1)
    print(f"tokens: {float((theirs == ours).float().mean()):.4f} equal, {int(differ.sum())} of "
          f"{len(differ)} rows differ somewhere")  # fmt: skip
    worst = []
    for row in differ.nonzero()[:8, 0].tolist():
        at = int((theirs[row] != ours[row]).nonzero()[0])
        ids = torch.cat([inputs["input_ids"][row], theirs[row, :at]])[None]
        mask = torch.nn.functional.pad(inputs["attention_mask"][row : row + 1], (0, at), value=1)
        with torch.inference_mode():
            logits = [
                m(input_ids=ids, attention_mask=mask, logits_to_keep=1,
                  position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[0, -1].float()
                for m in (peer, own)
            ]  # fmt: skip
        margin = logits[0][theirs[row, at]] - logits[0][ours[row, at]]
        noise = (logits[0] - logits[1]).abs().max()
        worst.append((at, float(margin), float(noise), float(logits[0].std())))
    for at, margin, noise, std in worst:
        print(f"  first differs at {at}: margin {margin:.4f}, the two logits differ by {noise:.4f}, "
              f"std of logits {std:.3f}")  # fmt: skip


def family(name: str) -> str:
    """Return the family of a kernel."""
    low = name.lower()
    if "attention" in low or "fmha" in low or "flash" in low or "sdpa" in low or "softmax" in low:
        return "attention"
    if any(part in low for part in ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv")):
        return "products"
    if "rotary" in low:
        return "rotary and cache"
    if "rms" in low or "silu" in low:
        return "norms, silu_mul"
    return "other"


def split(model: Any, inputs: dict[str, torch.Tensor], label: str, steps: int = 8) -> None:
    """Print the time of decode steps by kind of kernel."""
    generate(model, inputs, 0, 2)
    walls = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as short:
        start = time.perf_counter()
        generate(model, inputs, 0, 2)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as long:
        start = time.perf_counter()
        generate(model, inputs, 0, 2 + steps)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for sign, trace in ((-1, short), (1, long)):
        for event in trace.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kind = family(event.name)
                times[kind] += sign * event.time_range.elapsed_us()  # type: ignore[assignment]
                counts[kind] += sign
                if kind == "other":
                    others[event.name[:90]] += sign * event.time_range.elapsed_us()  # type: ignore[assignment]
    print(f"{label}: a step under the profiler {1e3 * (walls[1] - walls[0]) / steps:.2f} ms, "
          f"kernels {sum(times.values()) / steps / 1e3:.2f} ms")  # fmt: skip
    for kind, microseconds in times.most_common():
        print(f"  {kind}: {microseconds / steps / 1e3:.3f} ms, {counts[kind] / steps:.0f} launches")
    for name, microseconds in others.most_common(6):
        print(f"    other: {microseconds / steps / 1e3:.3f} ms {name}")


def host(model: Any, inputs: dict[str, torch.Tensor], label: str) -> None:
    """Print where Python spends its time."""
    profiler = cProfile.Profile()
    profiler.enable()
    generate(model, inputs, 0, 9)
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(22)
    print(f"--- host of {label}, 9 tokens")
    print("\n".join(line[:150] for line in text.getvalue().splitlines()[6:]))


def main() -> None:
    """Measure, compare tokens and divide the time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, length, new = (3, 20, 12) if small else (64, 128, 128)
    begin = time.perf_counter()
    peer, own = build(small, device)
    vocabulary = min(peer.config.text_config.vocab_size, peer.config.image_token_id or 10**9)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, length), generator=random).to(device)
    mask = torch.ones_like(ids)
    padded = mask.clone()
    for row in range(rows):
        padded[row, : row * length // (2 * rows)] = 0
    batches = {"equal lengths": mask, "left-padded": padded}
    print(torch.__version__, transformers.__version__, sys.argv, flush=True)
    for name, kept in batches.items():
        inputs = {"input_ids": ids * kept, "attention_mask": kept}
        for model in (peer, own):
            generate(model, inputs, 0, 6)
        results = {}
        # Alternating, the best of two
        for _ in range(2):
            for label, model in (("sdpa", peer), ("ours", own)):
                tokens, seconds, memory = timed(model, inputs, new, device)
                if label not in results or seconds < results[label][1]:
                    results[label] = tokens, seconds, memory
        (theirs, sdpa, peak), (ours, paged, own_peak) = results["sdpa"], results["ours"]
        print(f"{name}: sdpa {sdpa:.3f} s, ours {paged:.3f} s, ratio {paged / sdpa:.3f} "
              f"(mark 1.0); peaks {peak:.2f} and {own_peak:.2f} GB")  # fmt: skip
        compare(peer, own, inputs, theirs, ours)
        print(f"  ({time.perf_counter() - begin:.0f} s so far)", flush=True)
    if device == "cuda":
        split(own, inputs, "ours")
        split(peer, inputs, "sdpa")
    host(own, inputs, "ours")
    host(peer, inputs, "sdpa")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
