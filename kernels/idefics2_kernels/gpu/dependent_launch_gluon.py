"""The functions of ``dependent_launch`` for kernels in Gluon.

The argument ``anything`` is any number. Inline assembly needs an operand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def gdc_launch_dependents(IS_DEPENDENT: gl.constexpr, anything):
    """Allow the next kernel to start once all programs of this kernel have called this."""
    if IS_DEPENDENT:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;",
            "=r,r",
            [anything],
            gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def gdc_wait(IS_DEPENDENT: gl.constexpr, anything):
    """Wait until the previous kernel has ended and its writes are visible."""
    if IS_DEPENDENT:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;",
            "=r,r",
            [anything],
            gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def prefetch(ptrs):
    """Prefetch the lines that ``ptrs`` point into to the L2 cache; all must be allocated memory."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [ptrs.to(gl.int64)],
        gl.int32,
        is_pure=False,
        pack=1,
    )
