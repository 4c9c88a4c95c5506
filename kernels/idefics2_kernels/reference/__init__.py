"""The specification: every operation in plain PyTorch, in any float type and under autograd.

Must not import Triton, or any kernel; of the package it knows ``nf4.nf4_weight``, a format.
"""
