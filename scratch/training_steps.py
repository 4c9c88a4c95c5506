# ruff: noqa: D103
"""Time steps of training of `idefics2_engine.hf` beside transformers, PEFT and bitsandbytes.

    PYTHONPATH=engine:kernels:bench python scratch/training_steps.py qlora-mixed-b8 --json a.json
    PYTHONPATH=engine:kernels:bench python scratch/training_steps.py qlora-mixed-b8 --small

Cases: qlora-mixed-b8, qlora-equal-b8, lora-b8, full-b1, qlora-memory. One model is built and the
peer is timed on it. Then `accelerate_model` patches that model, and the same steps are timed again.
The weights are random. The peer's attention is flash-attn where it is installed, otherwise sdpa.
"""

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import peft
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from idefics2_bench import machine, transformers_peer
from idefics2_bench.offline_workloads import offline_requests
from idefics2_engine.hf import accelerate_model
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor

CASES = ("qlora-mixed-b8", "qlora-equal-b8", "lora-b8", "full-b1", "qlora-memory")
TARGETS = r".*(text_model|modality_projection|perceiver_resampler).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="the demo's sizes, for a dry run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peer", action="store_true")
    return parser.parse_args()


def read_config(args):
    folder = Path("examples/demo" if args.small else "tests/data/idefics2-8b")
    values = json.loads((folder / "config.json").read_text())
    if args.small:
        # bitsandbytes needs whole blocks on a CPU
        values["vision_config"] |= {"hidden_size": 128, "intermediate_size": 512}
    values["perceiver_config"]["rms_norm_eps"] = 1e-5
    processor = Processor.load(folder, ModelConfig.from_dict(values), split=False)
    return transformers.Idefics2Config(**values), processor


def build(args, config):
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    torch.manual_seed(0)
    with torch.device(args.device):
        kind = transformers.Idefics2ForConditionalGeneration
        # The config's own dtype would be the model's otherwise
        model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if args.case.startswith("qlora"):
        quantize(model, dtype)
    if "lora" in args.case:
        lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
        model = peft.get_peft_model(model, lora)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def quantize(model, dtype):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name == "lm_head":
                continue
            N, K = child.weight.shape
            layer = Linear4bit(
                K, N, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            weight = Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            layer.weight = weight.to(child.weight.device)
            layer.bias = child.bias
            setattr(parent, name, layer)


def rows_of(args, processor):
    """Return token ids with images, and how many tokens at the end are the answer."""
    random = np.random.default_rng(0)
    draw = lambda count: random.integers(300, 900, count).tolist()  # noqa: E731
    image = [processor.tokenizer.image_id] * processor.image_seq_len
    side = processor.image_config.longest_edge
    picture = random.integers(0, 256, (side, side, 3), np.uint8)
    scale = 16 if args.small else 1
    if args.case in ("qlora-mixed-b8", "lora-b8"):
        requests = offline_requests("mixed", processor, 8, 0, scale)
        return [
            (one.prompt_token_ids + draw(one.max_tokens), list(one.images), one.max_tokens)
            for one in requests
        ]
    if args.case == "qlora-equal-b8":
        text = 512 // scale
        return [(image + draw(text), [picture], text // 4) for _ in range(8)]
    count = 0 if args.case == "full-b1" else 20 // scale
    text = 4096 // scale
    return [(image * count + draw(text), [picture] * count, text if not count else text // 4)]


def batch(model, processor, rows):
    prompts = processor.finish(
        [processor.draft_token_prompt(ids, images) for ids, images, _ in rows]
    )
    kind = transformers.Idefics2ForConditionalGeneration
    inner = next(module for module in model.modules() if isinstance(module, kind))
    inputs = transformers_peer.generation_inputs(inner, prompts, processor.image_config, 0)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (_, _, answer) in zip(range(len(rows)), rows, strict=True):
        labels[row, -answer:] = inputs["input_ids"][row, -answer:]
    return inputs | {"labels": labels}


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure(args, model, inputs):
    trained = [p for p in model.parameters() if p.requires_grad]
    lora = "lora" in args.case
    before = [p.detach().clone() for p in trained] if lora else []
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if lora else None
    times, facts = [], {}
    for step in range(args.rounds + 1):
        if args.device == "cuda" and step == 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        synchronize(args)
        begin = time.perf_counter()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        synchronize(args)
        times.append((time.perf_counter() - begin) * 1e3)
        if step == 0:
            norms = torch.stack([p.grad.float().norm() for p in trained if p.grad is not None])
            facts = {"loss": loss.item(), "gradient_norm": norms.norm().item()}
        for parameter in trained:
            parameter.grad = None
        del loss
    for parameter, value in zip(trained, before, strict=False):
        parameter.data.copy_(value)
    if args.device == "cuda":
        facts["peak_GB"] = torch.cuda.max_memory_reserved() / 1e9
        facts["peak_allocated_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return {"ms": median(times[1:]), "first_ms": times[0], "steps_ms": times[1:], **facts}


def main():
    args = parse()
    config, processor = read_config(args)
    begin = time.perf_counter()
    model = build(args, config)
    inputs = batch(model, processor, rows_of(args, processor))
    shape = {name: list(tensor.shape) for name, tensor in inputs.items()}
    labeled = int((inputs["labels"] != -100).sum())
    print(f"built in {time.perf_counter() - begin:.0f} s: {shape}, {labeled} labels", flush=True)
    rows = []
    for impl in ["triton"] if args.no_peer else ["transformers", "triton"]:
        if impl == "triton":
            accelerate_model(model)
        try:
            row = {"kernel": "training", "case": args.case, "impl": impl}
            row |= measure(args, model, inputs)
        except torch.cuda.OutOfMemoryError as error:
            row["error"] = str(error)[:200]
            torch.cuda.empty_cache()
        rows.append(row)
        print(row, flush=True)
    if len(rows) == 2 and all("ms" in row for row in rows):
        theirs, ours = rows
        ours |= {"peer": "transformers", "peer_ms": theirs["ms"]}
        ours["speedup"] = theirs["ms"] / ours["ms"]
        print(f"{args.case}: {ours['ms'] / theirs['ms']:.3f} of the peer's time", flush=True)
        if "peak_GB" in ours:
            share = ours["peak_GB"] / theirs["peak_GB"]
            print(f"{ours['peak_GB']:.2f} GB, {share:.3f} of the peer's memory", flush=True)
    if args.json is not None:
        about = machine.describe(args.device) if args.device == "cuda" else {}
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


main()
