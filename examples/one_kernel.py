"""Run one kernel alone: causal attention over packed sequences of different lengths.

On a machine without a GPU the kernel runs in Triton's interpreter, which is slow and needs no
compiler.

    python examples/one_kernel.py
    TRITON_INTERPRET=1 python examples/one_kernel.py
"""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this variable when a kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

from idefics2_kernels import REFERENCE, TRITON


def main() -> None:
    """Compare the kernel with plain PyTorch."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    lengths = torch.tensor([70, 130, 3])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    total, longest = int(lengths.sum()), int(lengths.max())
    # There are 4 query heads. Each of the 2 key and value heads is shared by two of them.
    qkv = torch.randn(total, 4 + 2 + 2, 128, device=device)
    q, k, v = qkv.split([4, 2, 2], dim=1)
    out = TRITON.flash_attention(q, k, v, cu_seqlens, longest, causal=True, window=64)
    exact = REFERENCE.flash_attention(
        q.double(), k.double(), v.double(), cu_seqlens, longest, causal=True, window=64
    )
    print(f"{tuple(out.shape)} on {device}, largest error {(out - exact).abs().max():.1e}")


if __name__ == "__main__":
    main()
