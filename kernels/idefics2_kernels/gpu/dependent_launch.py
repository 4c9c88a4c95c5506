"""Programmatic dependent launch.

A kernel of a decode step begins while the one before it ends (Hopper and later).

Launching costs a microsecond or two, in which programs are handed out, read their arguments and
compute addresses. A kernel that lets the next one begin has that done meanwhile. The rule:

- ``gdc_launch_dependents`` comes first. The next kernel's programs only get what all programs of
  this one have left over, so that they can wait without being in anybody's way.
- ``gdc_wait`` comes before anything is read that an earlier kernel may have written, or written
  that an earlier one may read: until then only addresses are computed and weights brought to the L2
  cache, which never holds old values. A number that decides what to bring may be looked at, past
  the L1 cache and kept within bounds, but is read again after.
- NF4 weights are loaded before it. No kernel that lets the next one begin writes any, and what does
  is followed by a launch otherwise (``launch_barrier``), so that they are in memory before the
  kernel ahead begins.
- Every program that does anything waits, so that a kernel's end is also the end of all before it.
  Kernels launched otherwise, PyTorch's and cuBLAS's, end before the next begins and begin after the
  last has ended.
"""

import triton
import triton.language as tl

from idefics2_kernels.gpu.primitives import UPCAST
from idefics2_kernels.gpu.target import current_arch

ENABLED = True  # a switch for measurements
LINE = tl.constexpr(128)  # bytes that the L2 cache fetches


def dependent_options() -> dict[str, bool]:
    """Return a kernel's launch options and its constant ``IS_DEPENDENT``.

    The kernel must keep the rule above.
    """
    if ENABLED and not UPCAST.value and current_arch() >= 90:
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


def count_lines(row_bytes: int) -> int:
    """Return how many lines of the L2 cache hold a row of so many bytes, or the next power of two.

    This is ``prefetch_lines``' LINES.
    """
    return int(triton.next_power_of_2(triton.cdiv(row_bytes, LINE.value)))


@triton.jit
def gdc_launch_dependents(IS_DEPENDENT: tl.constexpr):
    """Let the next kernel begin when all programs have come here."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def gdc_wait(IS_DEPENDENT: tl.constexpr):
    """Wait until the kernel before has ended and all it wrote can be read."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(ptrs):
    """Bring the lines that ``ptrs`` point into to the L2 cache; all must be in memory of ours."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_lines(ptrs, start, end, LINES: tl.constexpr):
    """``prefetch`` ``LINES`` lines of each row that begins at ``ptrs`` (R,).

    They begin at column ``start``; the rows end at ``end``.
    """
    line: tl.constexpr = LINE // (ptrs.dtype.element_ty.primitive_bitwidth // 8)
    columns = tl.minimum(start + tl.arange(0, LINES) * line, end - 1)
    prefetch(ptrs[:, None] + columns[None, :])
