"""The specification: every operation in plain PyTorch, on any device and under autograd.

Arithmetic is in fp32. Wider inputs (float64) are computed in their own dtype. Results are rounded
to the input dtype once, where the model rounds.
This package must not import Triton or any kernel. It imports the NF4 format, ``nf4.nf4_weight``.
"""
