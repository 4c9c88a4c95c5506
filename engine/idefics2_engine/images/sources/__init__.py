"""Where an image comes from: files, bytes, pixels, data URIs and URLs.

In: an image in any supported form. Out: text, a path, bytes or pixels (``source_forms``), and what
a URL gave (``download``). Must not decode pixels.
"""
