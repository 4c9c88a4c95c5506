"""Files, bytes, arrays and addresses to the pixels that the model sees.

In: whatever a caller calls an image, and the rules of a ``MediaConfig``. Out: RGB images, cut and
resized to ``tiling.Tile``. ``loader`` is the only way in.
Must not import torch, but in the function ``tiling.position_ids``, or any package above it: of the
engine it needs ``errors``, ``caller_errors``, ``json_file`` and ``model_files``.
"""
