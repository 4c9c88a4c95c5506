"""Worker processes that decode image files.

In: bytes of files and the rules for their tiles. Out: pixels in shared memory. ``worker_pool`` is
the engine's side.
"""
