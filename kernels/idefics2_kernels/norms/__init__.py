"""RMS norm and layer norm, each alone and with the residual added first.

This package must not import ``attention``, ``matmul`` or ``nf4``.
"""
