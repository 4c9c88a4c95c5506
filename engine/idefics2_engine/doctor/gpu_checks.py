"""Checks of the GPU: its driver, whether it is seen, and which kernels run on it."""

from collections.abc import Iterator

from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.gpu_query import Gpu, Gpus
from idefics2_engine.doctor.machine import Machine
from idefics2_engine.doctor.packages import is_older, release, torch_cuda


def gpu_checks(machine: Machine, found: Gpus) -> Iterator[Check]:
    """Yield the checks of GPUs and their driver."""
    yield gpu_check(machine, found)
    yield driver_check(machine, found)
    yield kernels_check(found.gpus)


def gpu_check(machine: Machine, found: Gpus) -> Check:
    """Check that there is a GPU, and that torch will see it."""
    details = {
        "gpus": [gpu.to_dict() for gpu in found.gpus],
        "source": found.source or None,
        "CUDA_VISIBLE_DEVICES": machine.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if found.trouble and found.driver is None:
        fix = "sudo nvidia-smi; if that fails too, install the driver again and restart"
        text = f"unknown: nvidia-smi {found.trouble}"
        return Check("gpu", Status.PROBLEM, text, fix, details)
    if not found.gpus:
        text = "none: there is neither nvidia-smi nor /proc/driver/nvidia"
        if found.driver is not None:
            text = f"none, although there is a driver ({found.driver})"
        fix = (
            "nothing for the demo checkpoint, which runs on a CPU; the 8B model wants an NVIDIA "
            "GPU (in a container: docker run --gpus all)"
        )
        return Check("gpu", Status.WARNING, text, fix, details)
    text = ", ".join(map(_described, found.gpus))
    if found.trouble:
        text += f"; nvidia-smi {found.trouble}"
        return Check("gpu", Status.WARNING, text, "run nvidia-smi by hand", details)
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        text += f"; CUDA_VISIBLE_DEVICES={visible!r} hides it"
        return Check("gpu", Status.PROBLEM, text, "unset CUDA_VISIBLE_DEVICES", details)
    if visible is not None:
        text += f"; CUDA_VISIBLE_DEVICES={visible:.80}"
    return Check("gpu", Status.OK, text, details=details)


def _described(gpu: Gpu) -> str:
    text = gpu.name
    if gpu.capability is not None:
        text += f" (sm_{gpu.capability})"
    if gpu.total is not None:
        text += f" {gpu.total / 1e9:.1f} GB"
    if gpu.free is not None:
        text += f", {gpu.free / 1e9:.1f} GB free"
    return text


def driver_check(machine: Machine, found: Gpus) -> Check:
    """Check that the driver is new enough for the CUDA version of torch."""
    torch = machine.package("torch")
    cuda = None if torch is None else torch_cuda(torch)
    major = release(cuda)[0] if cuda else None
    least = facts.LEAST_DRIVER.get(major) if major else None
    details = {"driver": found.driver, "torch_cuda": cuda, "least": least}
    if found.driver is None:
        return Check("driver", Status.OK, "none: there is no GPU to drive", details=details)
    if cuda is None:
        text = f"{found.driver}; torch has no CUDA to compare it with"
        return Check("driver", Status.OK, text, details=details)
    if least is None:
        text = f"{found.driver}; the oldest one for CUDA {cuda} is not known here"
        return Check("driver", Status.OK, text, details=details)
    if is_older(found.driver, least):
        text = f"{found.driver}; torch's CUDA {cuda} needs {least}"
        fix = f"install driver {least} or newer, or a torch built for an older CUDA"
        return Check("driver", Status.PROBLEM, text, fix, details)
    return Check("driver", Status.OK, f"{found.driver}, fits CUDA {cuda}", details=details)


def kernels_check(gpus: tuple[Gpu, ...]) -> Check:
    """Check which kernels run on the GPUs, by their compute capability."""
    name = "kernels"
    if not gpus:
        text = "none run without a GPU: the plain PyTorch path computes"
        return Check(name, Status.OK, text, details={"kinds": []})
    kinds = [kernel_kind(gpu.capability) for gpu in gpus]
    details = {
        "kinds": kinds,
        "tuned_on": facts.TUNED_ON,
        "measured_on": list(facts.MEASURED_ON),
        "compiled_for": list(facts.COMPILED_FOR),
    }
    texts = [_kernels_on(gpu, kind) for gpu, kind in zip(gpus, kinds, strict=True)]
    found = "; ".join(dict.fromkeys(texts))
    measure = "idefics2 bench kernels checks and times every kernel on this GPU"
    if "none" in kinds:
        least = facts.LEAST_CAPABILITY / 10
        fix = f"use a GPU of capability {least} or higher, or --device cpu"
        return Check(name, Status.PROBLEM, found, fix, details)
    if all(is_measured(gpu) for gpu in gpus):
        return Check(name, Status.OK, found, details=details)
    return Check(name, Status.WARNING, found, measure, details)


def kernel_kind(capability: int | None) -> str:
    """Return which kernels a GPU runs: ``gluon``, ``plain``, ``none`` or ``unknown``."""
    if capability is None:
        return "unknown"
    if capability < facts.LEAST_CAPABILITY:
        return "none"
    return "gluon" if capability == facts.GLUON_CAPABILITY else "plain"


def is_measured(gpu: Gpu) -> bool:
    """Return whether every kernel was checked and timed on this model of GPU."""
    return any(name in gpu.name.split() for name in facts.MEASURED_ON)


def _kernels_on(gpu: Gpu, kind: str) -> str:
    if kind == "unknown":
        return f"{gpu.name}: unknown, because its compute capability is"
    if kind == "none":
        return f"{gpu.name}: none, because sm_{gpu.capability} is too old for them"
    text = "Gluon and plain Triton" if kind == "gluon" else "plain Triton"
    text += f", tuned on {facts.TUNED_ON}"
    if is_measured(gpu):
        return f"{text}, measured on {' and '.join(facts.MEASURED_ON)}"
    if gpu.capability in facts.COMPILED_FOR:
        return f"{text}, compiled in tests for sm_{gpu.capability}, not measured on {gpu.name}"
    return f"{text}, neither compiled in tests for sm_{gpu.capability} nor measured on {gpu.name}"
