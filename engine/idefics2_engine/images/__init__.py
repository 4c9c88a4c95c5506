"""Files, bytes, arrays and addresses to the pixels that the model sees.

In: whatever a caller calls an image, and the rules of a ``MediaConfig``. Out: RGB images, cut and
resized to ``tiling.Tile``. ``loader`` is the only way in.
Must not import torch, or any package of the engine but ``errors`` and what it needs.
"""
