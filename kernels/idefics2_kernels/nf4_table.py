"""NF4's look-up table in shared memory, for kernels in Gluon.

It has an entry for each byte of codes, the two values that its nibbles stand for in fp32, and each of a warp's lanes has
a copy of it in banks of its own. Assembly reads it, at an address that it takes to be where shared memory begins.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MEMORY = 256 * 32 * 8  # bytes
TABLE_BYTES = gl.constexpr(MEMORY)


@gluon.jit
def fill_table(code_ptr, smem, NUM_WARPS: gl.constexpr):
    """Write the two values of every byte, the high nibble's first, for each lane."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [NUM_WARPS, 1, 1], [2, 1, 0])
    byte = gl.arange(0, 256, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    is_first = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :] == 0
    lanes = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None] * 0
    smem.store(gl.load(code_ptr + (gl.where(is_first, byte >> 4, byte & 15) + lanes)))
