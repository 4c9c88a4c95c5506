"""Bounds on the work of decoding a file, checked before Pillow starts, a module per format.

In: a ``bounded_file.BoundedFile``. Out: nothing, or an ``ImageError``.
Must not decode pixels.
"""
