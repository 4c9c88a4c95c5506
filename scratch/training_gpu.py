"""Check and time the gradients on a GPU: rows as ``bench kernels`` writes them, and sweeps."""

import json
import sys
import time
import traceback

import torch

from idefics2_bench import machine
from idefics2_bench.gradient_peers import GRADIENT_PEERS
from idefics2_bench.kernels import bench_case
from idefics2_bench.timing import measure, num_copies
from idefics2_kernels.attention.flash_attention import flash_attention
from idefics2_kernels.attention.tiles import LaunchConfig
from idefics2_kernels.backward import flash_attention as attention
from idefics2_kernels.backward import layer_norm, linear_cross_entropy, rms_norm
from idefics2_kernels.catalog import CATALOG, gradient_of
from idefics2_kernels.catalog.criterion import case_error

BEGIN = time.perf_counter()
LIMIT = 170.0
OUT = {
    "machine": {},
    "rows": [],
    "wrong": [],
    "checked": {},
    "sweeps": [],
    "bits": {},
    "failed": [],
}
device = torch.device("cuda")


def left():
    return LIMIT - (time.perf_counter() - BEGIN)


def save():
    with open(sys.argv[1], "w") as file:
        json.dump(OUT, file, indent=1)


def failed(what):
    OUT["failed"].append([what, traceback.format_exc()[-1500:]])
    print("FAILED", what, traceback.format_exc()[-600:], flush=True)


SPECS = [spec for spec in CATALOG if gradient_of(spec)]
ABOUT = OUT["machine"] = {"copy_TBps": 4.1, "matmul_TFLOPs": 680.0}
try:
    ABOUT.update(machine.describe())
except Exception:
    failed("machine")
print(ABOUT, f"{left():.0f} s left", flush=True)


def time_case(spec, case):
    moved = spec.cost(case).bytes
    copies = max(1, min(num_copies(moved), (16 << 30) // max(1, moved), 8))
    for row in bench_case(spec, ["triton"], case, ABOUT, device, copies):
        OUT["rows"].append(row)
        ms = (
            f"{row['ms'] * 1e3:9.1f} us {row['TFLOPs']:6.0f} TF {row['GBps']:6.0f} GB/s {row['roofline']:.0%}"
            if "ms" in row
            else ""
        )
        print(
            f"{row['kernel']:26} {row['case']:18} {row['impl']:13} err {row['error']:.2f} {ms} {row.get('speedup', 0):.2f}x",
            flush=True,
        )


# 2. Attention: marks with peers, then tiles.
(flash,) = [spec for spec in SPECS if spec.name == "flash_attention_backward"]
CASES = {case.name: case for case in flash.cases}
for name in ("text-causal-4k", "text-causal-16k", "vision-4900", "vision-mixed"):
    try:
        time_case(flash, CASES[name])
    except Exception:
        failed(f"flash {name}")
    torch.cuda.empty_cache()
save()
print(f"{left():.0f} s left", flush=True)

KV = {
    128: [
        (64, 128, 8, 2),
        (32, 128, 8, 2),
        (32, 128, 8, 3),
        (64, 64, 4, 2),
        (64, 128, 8, 3),
        (128, 64, 8, 2),
        (64, 64, 8, 2),
    ],
    80: [
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (32, 128, 8, 3),
        (128, 128, 8, 2),
        (128, 64, 4, 2),
    ],
}
Q = {
    128: [
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 32, 8, 3),
    ],
    80: [
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 128, 4, 3),
    ],
}


# A kernel alone: the launches of the others are left out.
def alone(kernel_name, inputs):
    jits = {
        n: getattr(attention, n) for n in ("_row_statistics_kernel", "_dk_dv_kernel", "_dq_kernel")
    }

    class Skip:
        def __getitem__(self, grid):
            return lambda *a, **k: None

    for n in jits:
        if n != kernel_name:
            setattr(attention, n, Skip())
    # ``kernel is _dq_kernel`` must still hold, so only the skipped are replaced.
    try:
        return measure({"x": [lambda: attention.flash_attention_backward(**inputs)]})["x"].ms
    finally:
        for n, jit in jits.items():
            setattr(attention, n, jit)


for name in ("text-causal-4k", "vision-4900", "text-causal-16k"):
    case = CASES[name]
    width = 128 if case.dims["D"] == 128 else 80
    torch.manual_seed(0)
    inputs = flash.make_inputs(case, device)
    cost = flash.cost(case).flops
    try:
        print(name, "statistics", alone("_row_statistics_kernel", inputs), flush=True)
    except Exception:
        failed("statistics")
    for kernel, option, tiles in (
        ("_dk_dv_kernel", "dk_dv_config", KV),
        ("_dq_kernel", "dq_config", Q),
    ):
        kept = getattr(attention, option)
        share = 0.8 if kernel == "_dk_dv_kernel" else 0.6
        for tile in tiles[width] if name != "text-causal-16k" else tiles[width][:2]:
            if left() < 95:
                break
            setattr(attention, option, lambda *a, tile=tile: LaunchConfig(*tile))
            try:
                ms = alone(kernel, inputs)
                OUT["sweeps"].append([name, kernel, tile, ms])
                print(
                    f"{name} {kernel} {tile} {ms * 1e3:.1f} us, {share * cost / ms / 1e9:.0f} TFLOP/s of its products",
                    flush=True,
                )
            except Exception as error:
                print(name, kernel, tile, "failed", str(error)[:100], flush=True)
        setattr(attention, option, kept)
    save()
    del inputs
    torch.cuda.empty_cache()
print(f"{left():.0f} s left", flush=True)


# 1. The marks, correctness first (bench_case checks). Attention's large cases come in the sweep.
for spec in SPECS:
    if spec.name == "flash_attention_backward":
        continue
    for case in spec.cases:
        if case.where == "model" and left() > 40:
            try:
                time_case(spec, case)
            except Exception:
                failed(f"{spec.name} {case.name}")
            torch.cuda.empty_cache()
save()
print(f"{left():.0f} s left", flush=True)

# 3. Options of the others.
def sweep(spec_name, case_name, module, option, values):
    (spec,) = [spec for spec in SPECS if spec.name == spec_name]
    (case,) = [case for case in spec.cases if case.name == case_name]
    sets = [spec.make_inputs(case, device) for _ in range(2)]
    kept = getattr(module, option)
    for label, value in values:
        if left() < 30:
            break
        setattr(module, option, value)
        try:
            ms = measure(
                {"x": [lambda one=one: spec.implementations["triton"](**one) for one in sets]}
            )["x"].ms
            OUT["sweeps"].append([spec_name, case_name, label, ms])
            print(f"{spec_name} {case_name} {label}: {ms * 1e3:.1f} us", flush=True)
        except Exception as error:
            print(spec_name, label, "failed", str(error)[:100], flush=True)
    setattr(module, option, kept)


def rms(M, warps):
    return (f"BLOCK_M={M} warps={warps}", lambda N: rms_norm.LaunchConfig(M, 4096, warps))


def ln(M, warps):
    return (f"BLOCK_M={M} warps={warps}", lambda N: layer_norm.LaunchConfig(M, 1024, 128, warps))


def run_sweeps():
    sweep(
        "rms_norm_backward",
        "8192",
        rms_norm,
        "launch_config",
        [rms(1, 4), rms(1, 8), rms(1, 16), rms(2, 16)],
    )
    sweep(
        "rms_norm_backward",
        "8192-weight",
        rms_norm,
        "PROGRAMS",
        [(f"PROGRAMS={n}", n) for n in (132, 264, 528, 1056)],
    )
    sweep(
        "layer_norm_backward",
        "39200",
        layer_norm,
        "launch_config",
        [ln(1, 1), ln(2, 2), ln(4, 4), ln(1, 2), ln(2, 1)],
    )
    sweep(
        "layer_norm_backward",
        "39200-weight",
        layer_norm,
        "launch_config",
        [ln(1, 1), ln(2, 2), ln(4, 4), ln(1, 2)],
    )
    sweep(
        "layer_norm_backward",
        "39200-weight",
        layer_norm,
        "PROGRAMS",
        [(f"PROGRAMS={n}", n) for n in (264, 528, 1056)],
    )
    sweep(
        "linear_cross_entropy",
        "4096-all",
        linear_cross_entropy,
        "CHUNK_BYTES",
        [(f"{n} MiB", n << 20) for n in (24, 33, 40, 48, 64, 128, 256)],
    )
    sweep(
        "linear_cross_entropy",
        "4096-15-percent",
        linear_cross_entropy,
        "CHUNK_BYTES",
        [(f"{n} MiB", n << 20) for n in (24, 33, 40, 64)],
    )


try:
    run_sweeps()
except Exception:
    failed("sweeps")
save()

# 4. Memory of the loss, bits of two runs, the forward pass with the log-sum-exp.
try:
    (spec,) = [spec for spec in SPECS if spec.name == "linear_cross_entropy"]
    (case,) = [case for case in spec.cases if case.name == "4096-all"]
    inputs = spec.make_inputs(case, device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = spec.implementations["triton"](**inputs)
    extra = torch.cuda.max_memory_allocated() - before - result[2].nbytes
    OUT["loss_extra_share_of_fp32_logits"] = extra / (4096 * 32003 * 4)
    print("loss: extra memory / fp32 logits", OUT["loss_extra_share_of_fp32_logits"], flush=True)
    del inputs, result
except Exception:
    failed("memory")
for spec in SPECS:
    case = next(
        c for c in reversed(spec.cases) if c.where == "model" or c.name.startswith("gpu-many")
    )
    try:
        inputs = spec.make_inputs(case, device)
        one, two = (spec.run(spec.implementations["triton"], inputs) for _ in range(2))
        OUT["bits"][spec.name] = all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    except Exception:
        failed(f"bits {spec.name}")
    torch.cuda.empty_cache()
print("equal bits:", OUT["bits"], flush=True)
try:
    for name in ("text-causal-4k", "vision-4900"):
        inputs = {
            k: v
            for k, v in flash.make_inputs(CASES[name], device).items()
            if k not in ("dout", "out", "lse")
        }
        lse = torch.empty(inputs["q"].shape[1], inputs["q"].shape[0], device=device)
        found = measure(
            {
                "hopper": [lambda: flash_attention(**inputs)],
                "plain": [lambda: flash_attention(**inputs, plain=True)],
                "with lse": [lambda: flash_attention(**inputs, lse=lse)],
            }
        )
        OUT["sweeps"].append([name, "forward", {k: t.ms for k, t in found.items()}])
        print(name, {k: round(t.ms * 1e3, 1) for k, t in found.items()}, flush=True)
except Exception:
    failed("forward")
save()

# 5. As many of the cases for a GPU as there is time for.
for spec in SPECS:
    cases = [c for c in spec.cases if c.where in ("any", "gpu")]
    step = 5 if "attention" in spec.name else 3
    count = 0
    for case in cases[::step]:
        if left() < 5:
            break
        torch.manual_seed(0)
        try:
            error = case_error(spec, "triton", case, spec.make_inputs(case, device))
        except Exception:
            failed(f"{spec.name} {case.name}")
            continue
        count += 1
        if error > 1:
            OUT["wrong"].append([spec.name, case.name, error])
            print("WRONG", spec.name, case.name, error, flush=True)
    OUT["checked"][spec.name] = count
print(
    "checked",
    OUT["checked"],
    "wrong",
    len(OUT["wrong"]),
    "failed",
    len(OUT["failed"]),
    f"{time.perf_counter() - BEGIN:.0f} s",
)
save()
