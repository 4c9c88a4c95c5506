"""``dependent_launch`` for kernels in Gluon.

``anything`` is a number, as assembly has to be given one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def gdc_launch_dependents(IS_DEPENDENT: gl.constexpr, anything):
    """Let the next kernel begin when all programs have come here."""
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
    """Wait until the kernel before has ended and all it wrote can be read."""
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
    """Bring the lines that ``ptrs`` point into to the L2 cache; all must be in memory of ours."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [ptrs.to(gl.int64)],
        gl.int32,
        is_pure=False,
        pack=1,
    )
