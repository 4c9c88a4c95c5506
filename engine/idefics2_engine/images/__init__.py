"""Reading of images, and their conversion to the tiles that the model encodes.

In: an image in any supported form, and the rules of a ``MediaConfig``. Out: RGB images, split and
resized to ``tiling.Tile``. ``loader`` reads an image of any of the ``sources``, ``tiling`` makes
tiles of it, and ``parallel`` reads several images at once. ``reader`` does all of it for requests,
with the files that were seen (``file_cache``) and ``workers``.
Must not import torch, except inside ``tiling.position_ids``.
"""
