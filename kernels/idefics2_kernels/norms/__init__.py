"""RMS norm and layer norm, each alone and with the residual added first.

Must not import ``attention``, ``matmul`` or ``nf4``.
"""
