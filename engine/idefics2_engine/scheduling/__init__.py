"""The scheduler: the tokens of the next step, their pages and their encoder cache entries.

In: requests. Out: a ``scheduler.Step``.
Must not import torch, because its tests run thousands of steps on the host alone.
"""
