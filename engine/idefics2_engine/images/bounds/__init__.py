"""How much work a file may be, counted before Pillow does it, a module for each format.

In: a ``bounded_file.BoundedFile``. Out: nothing, or an ``ImageError``.
Must not decode pixels.
"""
