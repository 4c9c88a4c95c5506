"""An ordinary kernel between kernels of dependent launch.

The module does not import Triton, because the reference imports it.
"""

import torch


def launch_barrier(device: torch.device) -> None:
    """Launch a kernel that overlaps with no other on the current stream of ``device``.

    It starts after all earlier kernels have ended. No later kernel starts before it has ended (see
    ``dependent_launch``).
    """
    if device.type == "cuda":
        torch.zeros(1, device=device)
