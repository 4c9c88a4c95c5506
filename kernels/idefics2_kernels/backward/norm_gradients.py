"""Argument checks and tensors shared by the gradients of both norms."""

from dataclasses import dataclass

from torch import Tensor

from idefics2_kernels.gpu.checks import check_device, check_dtype, check_rows, check_shape
from idefics2_kernels.norms.rows import make_norm_rows


@dataclass(frozen=True)
class NormGradients:
    """The arguments of a norm's gradient as rows (M, N), and its result."""

    dy: Tensor
    x: Tensor
    dsum: Tensor | None
    dx: Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """Row strides of ``dy``, ``x`` and ``dsum``, in elements."""
        dsum = 0 if self.dsum is None else self.dsum.stride(0)
        return self.dy.stride(0), self.x.stride(0), dsum


def make_norm_gradients(
    dy: Tensor, x: Tensor, dsum: Tensor | None, **vectors: Tensor
) -> NormGradients:
    """Check the arguments of a norm's gradient and allocate its result.

    Args:
        dy: Gradient of the norm's result (..., N).
        x: Input of the norm (..., N).
        dsum: A further gradient of ``x``, or ``None``.
        vectors: Weight and bias by name, (N,) each.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = make_norm_rows(x, None, **vectors)
    N = x.shape[-1]
    for name, tensor in (("dy", dy), ("dsum", dsum)):
        if tensor is not None:
            check_shape(name, tensor, tuple(x.shape))
            check_dtype(name, tensor, x.dtype)
            check_rows(name, tensor)
    check_device(x=x, dy=dy, dsum=dsum)
    dsum_rows = None if dsum is None else dsum.reshape(-1, N)
    return NormGradients(dy.reshape(-1, N), rows.x, dsum_rows, rows.out)
