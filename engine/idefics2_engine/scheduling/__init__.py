"""Which tokens are computed next, and in which pages and encoder cache entries.

In: requests. Out: a ``scheduler.Step``.
Must not import torch: its tests run steps by the thousand on the host alone.
"""
