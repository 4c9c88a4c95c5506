"""Checks of memory, of the GPU and of the host, against what a model takes."""

import re
from collections.abc import Iterator

from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.control_group import memory_left
from idefics2_engine.doctor.gpu_query import Gpu
from idefics2_engine.doctor.machine import Machine
from idefics2_engine.doctor.model_memory import (
    MemoryNeed,
    largest_tensor_bytes,
    memory_need,
    weight_bytes,
)
from idefics2_engine.images.workers.worker_pool import POOL_BYTES
from idefics2_engine.model.config import ModelConfig

# A shorter context has no room for a few split images, of 326 tokens each, and an answer
_USEFUL_TOKENS = 2048
_LABELS = {"bf16": "bf16", "nf4": "NF4"}


def memory_checks(
    machine: Machine, config: ModelConfig, model: str, gpus: tuple[Gpu, ...]
) -> Iterator[Check]:
    """Yield the checks of memory for ``config``, which belongs to the model called ``model``."""
    yield gpu_memory_check(config, model, gpus)
    yield host_memory_check(machine, config, model, has_gpu=bool(gpus))


def gpu_memory_check(config: ModelConfig, model: str, gpus: tuple[Gpu, ...]) -> Check:
    """Check whether the model fits on each GPU, in bf16 and in NF4."""
    name = "gpu memory"
    needs = {kind: memory_need(config, nf4=kind == "nf4") for kind in ("bf16", "nf4")}
    details = {
        "model": model,
        **{
            kind: {
                "weights_bytes": need.weights,
                "beside_bytes": need.beside,
                "kv_token_bytes": need.token,
                "full_sequence_bytes": need.whole(need.positions),
            }
            for kind, need in needs.items()
        },
    }
    wanted = f"{model} takes " + ", ".join(
        f"{_gb(need.whole(need.positions))} in {_LABELS[kind]} (weights {_gb(need.weights)})"
        for kind, need in needs.items()
    )
    known = [gpu for gpu in gpus if gpu.total is not None]
    if not known:
        found = f"not compared: {'the memory is not known' if gpus else 'no GPU'}; {wanted}"
        return Check(name, Status.OK, found, details=details)
    # The smallest one decides, because every worker of a job loads the model
    gpu = min(known, key=_usable)
    status, text, fix = _fits(gpu, needs)
    return Check(name, status, f"{wanted}; {text}", fix, details)


def _usable(gpu: Gpu) -> int:
    """Return the bytes that an engine may use, by the default ``gpu_memory_utilization``."""
    total = gpu.total or 0
    used = total - (total if gpu.free is None else gpu.free)
    return int(facts.MEMORY_UTILIZATION * total) - used


def _fits(gpu: Gpu, needs: dict[str, MemoryNeed]) -> tuple[Status, str, str]:
    usable = _usable(gpu)
    tokens = {kind: need.tokens_in(usable) for kind, need in needs.items()}
    have = f"{_gb(usable)} of {gpu.name} are usable"
    fitting = [kind for kind in needs if tokens[kind] >= needs[kind].positions]
    if "bf16" in fitting:
        return Status.OK, f"{have}: bf16 has room for {tokens['bf16']} tokens of KV cache", ""
    short = [kind for kind in needs if tokens[kind] >= _USEFUL_TOKENS]
    fixes = []
    if "bf16" in short:
        fixes.append(f"--max-model-len {tokens['bf16']}")
    if fitting:
        fixes.append("--quantization nf4")
    elif "nf4" in short:
        fixes.append(f"--quantization nf4 --max-model-len {tokens['nf4']}")
    if not fixes:
        used = (gpu.total or 0) - (gpu.free if gpu.free is not None else gpu.total or 0)
        empty = usable + used
        if needs["nf4"].tokens_in(empty) >= _USEFUL_TOKENS:
            fix = "end the processes that nvidia-smi lists, or choose another GPU"
            return Status.PROBLEM, f"{have}: other processes leave too little", fix
        return Status.PROBLEM, f"{have}: too little, even in NF4", "use a GPU with more memory"
    return Status.WARNING, f"{have}: bf16 with all positions does not fit", " or ".join(fixes)


def host_memory_check(machine: Machine, config: ModelConfig, model: str, *, has_gpu: bool) -> Check:
    """Check the memory that is available to this process."""
    name = "host memory"
    meminfo = machine.read("proc/meminfo") or ""
    total, available = (_kibi(meminfo, key) for key in ("MemTotal", "MemAvailable"))
    limit = memory_left(machine)
    details = {"total_bytes": total, "available_bytes": available, "cgroup_left_bytes": limit}
    if available is None:
        found = "unknown: there is no /proc/meminfo"
        return Check(name, Status.OK, found, details=details)
    free = available if limit is None else min(available, limit)
    found = f"{_gb(free)} available" + (
        ", by the limit of the control group" if limit is not None and limit < available else ""
    )
    if has_gpu:
        # Pixels of image workers, images prepared ahead, and a tensor on its way to the GPU
        need = POOL_BYTES + facts.PREPARED_BYTES + largest_tensor_bytes(config)
        details["needed_bytes"] = need
        if free < need:
            fix = "raise the limit, or prepare fewer images ahead (max_prepared_bytes)"
            text = f"{found}; a job prepares images in up to {_gb(need)}"
            return Check(name, Status.WARNING, text, fix, details)
        return Check(name, Status.OK, f"{found}; a job needs {_gb(need)}", details=details)
    need, less = weight_bytes(config, 4), weight_bytes(config, 2)
    details["needed_bytes"] = need
    text = f"{found}; on the CPU {model} takes {_gb(need)} in fp32, {_gb(less)} in bf16"
    if free < less:
        fix = "nothing for the demo checkpoint; use a GPU or a larger host for this model"
        return Check(name, Status.WARNING, text, fix, details)
    if free < need:
        fix = "add --dtype bfloat16 to idefics2 run"
        return Check(name, Status.WARNING, text, fix, details)
    return Check(name, Status.OK, text, details=details)


def _kibi(meminfo: str, key: str) -> int | None:
    found = re.search(rf"^{key}:\s*(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number < 10e9 else f"{number / 1e9:.1f} GB"
