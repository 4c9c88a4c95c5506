"""Reading of images, and their conversion to the tiles that the model encodes.

In: an image in any supported form, and the rules of a ``MediaConfig``. Out: RGB images, split and
resized to ``tiling.Tile``. ``loader`` reads an image, ``tiling`` makes tiles of it, and
``parallel`` reads several images at once.
Must not import torch, except inside ``tiling.position_ids``.
"""
