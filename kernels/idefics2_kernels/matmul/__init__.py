"""Matrix products of dense weights: cuBLAS for many rows, a split-K kernel for few.

Imports ``activation``. Must not import ``attention``, ``nf4`` or ``norms``.
"""
