"""Bounds on the work of decoding a file, checked before Pillow starts.

In: the bytes of a file. Out: an ``ImageError`` if a bound is exceeded. ``bounded_file`` counts
Pillow's reads. The other modules count the parts of a format: ``chunks`` of PNG and WebP, ``jpeg``
segments and scans, ``tags`` of TIFF and EXIF, and ``tiff`` strips and tiles.
Must not decode pixels.
"""
