"""Reading of images, and their conversion to the tiles that the model encodes.

In: an image in any supported form, and the rules of a ``MediaConfig``. Out: RGB images, split and
resized to ``tiling.Tile``. ``loader`` is the only entry point.
Must not import torch. Of the engine, it imports only ``errors`` and the reading of config files.
"""
