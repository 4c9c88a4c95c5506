"""Weights in the NF4 format of bitsandbytes: quantization, dequantization and products.

``nf4_matmul`` selects a kernel by the number of rows. Modules named ``_hopper`` contain Gluon
kernels for sm_90 only. ``dequantize_triton`` and ``dequantize_gluon`` decode codes inside a kernel.
This package imports ``matmul.split_k``. It must not import ``attention`` or ``norms``.
"""
