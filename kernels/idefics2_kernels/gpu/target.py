"""Facts about the GPU that kernels are compiled for and launched on."""

import torch
from torch import Tensor
from triton.runtime import driver

from idefics2_kernels.gpu.primitives import UPCAST

# The GPU that launch options were measured on. How work is divided must not change from one GPU to
# the next where sums depend on it.
H100_SMS = 132


def current_arch() -> int:
    """Return the compute capability compiled for, times ten; 90 (Hopper) for the interpreter."""
    return 90 if UPCAST.value else int(driver.active.get_current_target().arch)


def is_hopper() -> bool:
    """Return whether kernels are compiled, not interpreted, for Hopper: Gluon's kernels can run."""
    return not UPCAST.value and current_arch() == 90


def num_sms(device: torch.device) -> int:
    """Return the number of SMs of ``device``; an H100's for a CPU."""
    if device.type != "cuda":
        return H100_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def alignment(*tensors: Tensor) -> int:
    """Return how many elements make 16 bytes if every row begins at a multiple of them, else 1."""
    aligned = all(
        t.data_ptr() % 16 == 0
        and t.numel() > 0
        and all(s > 0 and s * t.itemsize % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )
    return 16 // tensors[0].itemsize if aligned else 1
