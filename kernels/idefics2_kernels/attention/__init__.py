"""Attention: packed, paged, and of the perceiver. ``_hopper`` in a name means Gluon, sm_90 only.

In and out: see the protocols in ``ops``. ``tiles`` and ``split_kv`` are shared by the Triton
kernels, ``warp_specialized`` by the Gluon ones. Must not import ``nf4``, ``matmul`` or ``norms``.
"""
