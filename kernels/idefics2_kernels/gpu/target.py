"""Facts about the GPU that kernels are compiled for and launched on."""

import torch
from torch import Tensor
from triton.runtime import driver

from idefics2_kernels.gpu.primitives import UPCAST

# SMs of an H100, on which the launch options were measured. Where the order of a sum depends on the
# division of work, the division must be the same on all GPUs and uses this number.
H100_SMS = 132


def current_arch() -> int:
    """Return ten times the target's compute capability, or 90 (Hopper) in the interpreter."""
    return 90 if UPCAST.value else int(driver.active.get_current_target().arch)


def is_hopper() -> bool:
    """Return whether kernels are compiled for Hopper, so that Gluon kernels can run."""
    return not UPCAST.value and current_arch() == 90


def num_sms(device: torch.device) -> int:
    """Return the number of SMs of ``device``, or that of an H100 for a CPU."""
    if device.type != "cuda":
        return H100_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def alignment(*tensors: Tensor) -> int:
    """Return the elements in 16 bytes if all rows are aligned to 16 bytes, else 1."""
    aligned = all(
        t.data_ptr() % 16 == 0
        and t.numel() > 0
        and all(s > 0 and s * t.itemsize % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )
    return 16 // tensors[0].itemsize if aligned else 1
