"""What a path computes at each stage, and its recording on disk.

In: a path and cases. Out: a ``Recording``. Transformers is imported by functions alone.
"""
