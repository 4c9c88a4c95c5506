"""Attention within packed sequences, to a paged KV cache, and of the perceiver.

The protocols in ``ops`` describe inputs and outputs. Modules named ``_hopper`` contain Gluon
kernels for sm_90 only. The Triton kernels share ``tiles`` and ``split_kv``, and the Gluon kernels
share ``warp_specialized``. This package must not import ``nf4``, ``matmul`` or ``norms``.
"""
