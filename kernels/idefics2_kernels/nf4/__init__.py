"""Weights in bitsandbytes' NF4: quantized, dequantized and multiplied.

``nf4_matmul`` chooses among the kernels by the number of rows. ``_hopper`` in a name means Gluon,
sm_90 only. ``dequantize_triton`` and ``dequantize_gluon`` turn codes into numbers inside a kernel.
Imports ``matmul.split_k``. Must not import ``attention`` or ``norms``.
"""
