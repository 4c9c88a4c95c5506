"""The specification: every operation in plain PyTorch, on any device and under autograd.

Arithmetic is in fp32, or in the input's own dtype if that is wider: float64 inputs are computed in
float64. Results are rounded to the input dtype once, where the model rounds.
Must not import Triton, or any kernel; of the package it knows ``nf4.nf4_weight``, a format.
"""
