"""Reading of images, and their conversion to the tiles that the model encodes.

In: an image in any supported form, and the rules of a ``MediaConfig``. Out: RGB images, split and
resized to ``tiling.Tile``. ``loader`` reads an image, ``tiling`` makes tiles of it, and
``parallel`` reads several images at once. ``reader`` does all of it for requests, with the files
that were seen (``file_cache``) and worker processes (``worker_pool``).
Must not import torch, except inside ``tiling.position_ids``.
"""
