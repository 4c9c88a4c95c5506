"""Marks of `idefics2_engine.hf` on one GPU, against transformers on the same memory.

    PYTHONPATH=engine:kernels:bench python scratch/hf_marks.py --out marks.json
    PYTHONPATH=engine:kernels:bench python scratch/hf_marks.py --small --out /tmp/marks.json  (a CPU)

Random weights in the shape of idefics2-8b, built on the device. Each row is printed and written as
soon as it is measured. `--only` names groups: forward generate compiled memory nf4.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import idefics2_engine.llm
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.hf import Idefics2ForConditionalGeneration
from idefics2_engine.hf.accelerate import patch_blocks
from idefics2_engine.hf.operations import operations_of
from idefics2_engine.hf.shared_weights import config_of, model_on

FOLDER = Path("tests/data/idefics2-8b")
NO_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MARKS = {
    "prefill": 0.75,
    "mixed_pictures": 0.30,
    "full_pictures": 0.75,
    "generate_engine_over_eager": 0.25,
    "generate_engine_over_compiled": 0.6,
    "generate_engine_over_llm": 1.1,
    "generate_loop_over_eager": 1.0,
    "nf4_decode": 0.12,
}

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="hf_marks.json")
parser.add_argument("--small", action="store_true", help="a tiny shape, to try the script")
parser.add_argument(
    "--only", nargs="*", default=["forward", "generate", "compiled", "memory", "nf4"]
)
options = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = device.type == "cuda"
dtype = torch.bfloat16 if on_gpu else torch.float32
SMALL = options.small
PREFILL, ROWS, PROMPT, NEW = (96, 3, 12, 6) if SMALL else (4096, 64, 128, 128)
begin = time.perf_counter()
results = {
    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "rows": [],
}


def wait():
    if on_gpu:
        torch.cuda.synchronize()


def seconds(function, repeats):
    """Return the median of `repeats` after one run that is not timed."""
    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name, ours, theirs, **more):
    made = {"mark": name, "ours_s": ours, "theirs_s": theirs, "ratio": ours / theirs, **more}
    made["wanted"] = MARKS.get(name)
    made["at_s"] = round(time.perf_counter() - begin, 1)
    add(made)


def add(made):
    results["rows"].append(made)
    print(json.dumps(made), flush=True)
    Path(options.out).write_text(json.dumps(results, indent=1))


def group(function):
    if function.__name__ not in options.only:
        return
    try:
        with torch.no_grad():
            function()
    except Exception:
        add({"group": function.__name__, "error": traceback.format_exc()[-1500:]})


def pictures(sizes):
    height, width = (max(size[i] for size in sizes) for i in (0, 1))
    values = torch.zeros(1, len(sizes), 3, height, width, device=device, dtype=dtype)
    mask = torch.zeros(1, len(sizes), height, width, device=device, dtype=torch.long)
    for i, (h, w) in enumerate(sizes):
        values[0, i, :, :h, :w].normal_()
        mask[0, i, :h, :w] = 1
    return {"pixel_values": values, "pixel_attention_mask": mask}


def best(function, repeats):
    """Return the time of transformers with its best backend of sdpa, and its name."""
    times = {"all": seconds(function, repeats)}
    if on_gpu:
        with sdpa_kernel(NO_CUDNN):
            times["without cuDNN"] = seconds(function, repeats)
    name = min(times, key=times.get)
    return times[name], name


config = transformers.Idefics2Config.from_pretrained(FOLDER)
if SMALL:
    config.text_config.update({"hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})  # fmt: skip
    config.vision_config.update({"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 3})  # fmt: skip
    config.perceiver_config.update({"hidden_size": 64, "resampler_depth": 1})
torch.manual_seed(0)
with torch.device(device):
    own = Idefics2ForConditionalGeneration._from_config(config, dtype=dtype).eval()
own.requires_grad_(False)
# One rule for both sides, so that the values can be compared
own.rules = "transformers"
greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0)
own.generation_config = copy.deepcopy(greedy)
packed = own.engine.share_weights(
    own, config_of(own), operations_of(own.model.connector).on(device)
)
peer = model_on(packed, transformers.Idefics2ForConditionalGeneration, copy.deepcopy(own.config),
                attn_implementation="sdpa", dtype=dtype)  # fmt: skip
peer.generation_config = copy.deepcopy(greedy)
weights = packed.num_bytes
ids = torch.randint(5, 30000, (1, PREFILL), device=device)
texts = torch.randint(5, 30000, (ROWS, PROMPT), device=device)
print(f"built in {time.perf_counter() - begin:.1f} s, {weights / 1e9:.2f} GB", flush=True)


def agreement(got, wanted):
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def compare(name, run, repeats):
    difference = agreement(run(own), run(peer))
    theirs, backend = best(lambda: run(peer), repeats)
    row(name, seconds(lambda: run(own), repeats), theirs, difference=difference, peer=backend)


def forward():
    compare("prefill", lambda m: m(input_ids=ids, logits_to_keep=1).logits, 5)
    generator = torch.Generator().manual_seed(1)
    sides = torch.randint(27, 71, (2 if SMALL else 16, 2), generator=generator) * 14
    mixed = pictures([tuple(s) for s in sides.tolist()])
    compare(
        "mixed_pictures", lambda m: torch.cat(list(m.get_image_features(**mixed).pooler_output)), 5
    )
    full = pictures([(980, 980)] * (1 if SMALL else 8))
    compare(
        "full_pictures", lambda m: torch.cat(list(m.get_image_features(**full).pooler_output)), 5
    )


def run_peer(model=peer, rows=texts, **more):
    # cuDNN's attention is slow for one query a row
    with sdpa_kernel(NO_CUDNN):
        return model.generate(rows, attention_mask=torch.ones_like(rows), **more)


def run_own(backend, rows=texts, **more):
    own.generation_backend = backend
    with sdpa_kernel(NO_CUDNN):
        return own.generate(rows, attention_mask=torch.ones_like(rows), **more)


times = {}


def generate():
    wanted = run_peer()
    times["eager"] = seconds(run_peer, 1)
    start = time.perf_counter()
    first = run_own("engine")
    wait()
    making = time.perf_counter() - start
    times["engine"] = seconds(lambda: run_own("engine"), 3)
    new = slice(PROMPT, None)
    row("generate_engine_over_eager", times["engine"], times["eager"], first_call_s=making,
        same_tokens=float((first == wanted)[:, new].float().mean()),
        kv_cache_tokens=own.engine.engine.config.kv_cache_tokens)  # fmt: skip
    loop = run_own("transformers")
    times["loop"] = seconds(lambda: run_own("transformers"), 1)
    row("generate_loop_over_eager", times["loop"], times["eager"],
        same_tokens=float((loop == wanted)[:, new].float().mean()))  # fmt: skip
    own.engine.close()
    # LLM on the same weights
    with patch.object(idefics2_engine.llm, "load_model", lambda *_: packed):
        llm = LLM(FOLDER, device=str(device), dtype=str(dtype).removeprefix("torch."),
                  kv_cache_tokens=max(32768, ROWS * (PROMPT + NEW)), max_num_seqs=ROWS,
                  image_workers=0, enable_prefix_caching=False)  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in texts.tolist()]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    answers = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    times["llm"] = seconds(lambda: llm.generate(prompts, params), 3)
    row("generate_engine_over_llm", times["engine"], times["llm"],
        same_tokens=float((first[:, new].cpu() == torch.tensor(answers)).float().mean()))  # fmt: skip
    llm.close()


def memory():
    """Peak of allocations beside weights and KV cache, of each way to generate."""
    if not on_gpu:
        return
    cache = ROWS * (PROMPT + NEW) * packed.config.text.kv_values * packed.dtype.itemsize
    found = {}
    for name, run in {
        "transformers": run_peer,
        "loop": lambda: run_own("transformers"),
        "engine": lambda: run_own("engine"),
    }.items():
        own.engine.close()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        found[name] = (torch.cuda.max_memory_allocated() - weights - cache) / 1e9
    own.engine.close()
    left = (torch.cuda.memory_allocated() - weights) / 1e9
    add({"mark": "memory_beside_weights_and_kv_gb", **found, "after_close": left,
         "weights_gb": weights / 1e9, "kv_gb": cache / 1e9})  # fmt: skip


def compiled():
    """Transformers compiles its decode step by itself if the cache is static."""
    own.engine.close()
    start = time.perf_counter()
    run_peer(cache_implementation="static")
    wait()
    making = time.perf_counter() - start
    times["compiled"] = seconds(lambda: run_peer(cache_implementation="static"), 1)
    if "engine" in times:
        row(
            "generate_engine_over_compiled", times["engine"], times["compiled"], first_call_s=making
        )
    else:
        add({"compiled_s": times["compiled"], "first_call_s": making})


def nf4():
    """Decode one sequence, with the layers of `peer` in NF4, which `own` then shares."""
    import bitsandbytes

    own.engine.forget_weights()
    for name, layer in list(peer.named_modules()):
        if type(layer) is not torch.nn.Linear or name == "lm_head":
            continue
        made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features,
            layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.clone(), requires_grad=False, quant_type="nf4"
        ).to(device)
        made.bias = layer.bias
        peer.set_submodule(name, made)
        own.set_submodule(name, made)
    one, few, many = texts[:1], 2, 4 if SMALL else 66

    def decode(run):
        long, short = (seconds(lambda n=n: run(rows=one, max_new_tokens=n), 3) for n in (many, few))
        return (long - short) / (many - few)

    theirs = decode(run_peer)
    wanted = run_peer(rows=one, max_new_tokens=many)
    patch_blocks(own, operations_of(own.model.connector))
    got = run_own("engine", rows=one, max_new_tokens=many)
    row("nf4_decode", decode(lambda **more: run_own("engine", **more)), theirs,
        same_tokens=float((got == wanted)[:, PROMPT:].float().mean()))  # fmt: skip


for part in (forward, generate, memory, compiled, nf4):
    group(part)
print(f"done in {time.perf_counter() - begin:.1f} s", flush=True)
sys.exit(any("error" in made for made in results["rows"]))
