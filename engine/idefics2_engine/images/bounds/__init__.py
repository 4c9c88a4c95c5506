"""Bounds on the work of decoding a file, checked before Pillow starts.

In: the bytes of a file. Out: nothing, or an ``ImageError``. ``bounded_file`` counts what Pillow
reads; the others count the parts of a format: ``chunks`` of PNG and WebP, ``tags`` of TIFF and EXIF.
Must not decode pixels.
"""
