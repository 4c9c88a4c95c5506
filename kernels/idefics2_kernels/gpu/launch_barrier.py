"""An ordinary kernel between kernels of dependent launch.

It imports no Triton, because the reference imports it.
"""

import torch


def launch_barrier(device: torch.device) -> None:
    """Launch a kernel that overlaps with no other on the current stream of ``device``.

    It begins after all that was launched before has ended, and nothing launched later begins before
    it has ended (see ``dependent_launch``).
    """
    if device.type == "cuda":
        torch.zeros(1, device=device)
