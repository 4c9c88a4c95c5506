"""transformers' Idefics2 image processor with this package's preparation of images."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import BatchFeature
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.images.padded_pixels import padded_pixels
from idefics2_engine.images.tiling import ImageConfig, Tile, make_tiles

_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_pad")


class Idefics2ImageProcessor(Idefics2ImageProcessorPil):
    """transformers' ``Idefics2ImageProcessorPil``, whose tensors it makes bit for bit, faster.

    Images with three channels of bytes are split, resized and normalized as in ``LLM``. Others, and
    calls that leave out a step, are prepared by transformers.
    """

    def _preprocess(  # type: ignore[override]
        self, images: list[list[npt.NDArray[Any]]], **settings: Any
    ) -> Any:
        """Prepare ``images``, a list of (3, H, W) for each sample, with checked ``settings``."""
        config = _image_config(settings)
        if config is None or not all(map(_is_rgb, (i for sample in images for i in sample))):
            return super()._preprocess(images, **settings)
        tiles = [[tile for image in sample for tile in _tiles(image, config)] for sample in images]
        if not any(tiles):
            return super()._preprocess(images, **settings)
        return BatchFeature(padded_pixels(tiles, config), tensor_type=settings["return_tensors"])


def _image_config(settings: dict[str, Any]) -> ImageConfig | None:
    """Return ``settings`` of transformers, or ``None`` if a step is left out or is another."""
    size, resample = settings["size"], settings["resample"]
    mean, std = settings["image_mean"], settings["image_std"]
    if (
        not all(settings[step] for step in _STEPS)
        or not (size.shortest_edge and size.longest_edge)
        or resample not in list(Image.Resampling)
        or any(not isinstance(values, list | tuple) or len(values) != 3 for values in (mean, std))
    ):
        return None
    return ImageConfig(
        longest_edge=size.longest_edge,
        shortest_edge=size.shortest_edge,
        split=bool(settings["do_image_splitting"]),
        resample=int(resample),
        rescale_factor=settings["rescale_factor"],
        mean=tuple(mean),
        std=tuple(std),
    )


def _is_rgb(image: npt.NDArray[Any]) -> bool:
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] == 3


def _tiles(image: npt.NDArray[Any], config: ImageConfig) -> list[Tile]:
    """Return the tiles of ``image`` (3, H, W). Patches are cut by the model."""
    rgb = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return make_tiles(rgb, config, patch_size=1, grid_side=1)
