"""Matrix products of dense weights: cuBLAS for many rows, a split-K kernel for few.

This package imports ``activation``. It must not import ``attention``, ``nf4`` or ``norms``.
"""
