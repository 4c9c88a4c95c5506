"""Programmatic dependent launch: a kernel starts while the previous one ends (Hopper and later).

A launch costs one or two microseconds, in which programs are scheduled, read their arguments and
compute addresses. With dependent launch this overlaps with the previous kernel. Every kernel that
uses it follows these rules:

- ``gdc_launch_dependents`` is the first statement. Programs of the next kernel start only on
  resources that all programs of this kernel have left free, so they can wait without slowing it
  down.
- ``gdc_wait`` precedes every read of memory that an earlier kernel may have written, and every
  write to memory that an earlier kernel may read. Before it, a kernel only computes addresses and
  prefetches weights into the L2 cache, which is coherent. A value that decides what to prefetch may
  be read before ``gdc_wait``. That read must bypass the L1 cache, its result must be kept within
  bounds, and the value must be read again after ``gdc_wait``.
- NF4 weights may be loaded before ``gdc_wait``. Kernels that write them do not use dependent
  launch, and an ordinary launch follows them (``launch_barrier``). The weights are therefore in
  memory before any dependent kernel starts.
- Every program that does any work calls ``gdc_wait``. When a kernel ends, all kernels before it
  have therefore ended too. Ordinary kernels, such as those of PyTorch and cuBLAS, overlap with no
  other kernel.
"""

import triton
import triton.language as tl

from idefics2_kernels.gpu.primitives import UPCAST
from idefics2_kernels.gpu.target import current_arch

# A switch for measurements.
ENABLED = True
# Bytes of a line of the L2 cache.
LINE = tl.constexpr(128)


def dependent_options() -> dict[str, bool]:
    """Return the launch options of a kernel and its constant ``IS_DEPENDENT``.

    The kernel must follow the rules in this module's docstring.
    """
    if ENABLED and not UPCAST.value and current_arch() >= 90:
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


def count_lines(row_bytes: int) -> int:
    """Return the number of L2 cache lines of a row of ``row_bytes``, rounded up to a power of two.

    It is the argument ``LINES`` of ``prefetch_lines``.
    """
    return int(triton.next_power_of_2(triton.cdiv(row_bytes, LINE.value)))


@triton.jit
def gdc_launch_dependents(IS_DEPENDENT: tl.constexpr):
    """Allow the next kernel to start once all programs of this kernel have called this."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def gdc_wait(IS_DEPENDENT: tl.constexpr):
    """Wait until the previous kernel has ended and its writes are visible."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(ptrs):
    """Prefetch the lines that ``ptrs`` point into to the L2 cache; all must be allocated memory."""
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
    """Prefetch ``LINES`` lines of each row that begins at ``ptrs`` (R,), from column ``start`` on.

    The rows end at column ``end``.
    """
    line: tl.constexpr = LINE // (ptrs.dtype.element_ty.primitive_bitwidth // 8)
    columns = tl.minimum(start + tl.arange(0, LINES) * line, end - 1)
    prefetch(ptrs[:, None] + columns[None, :])
