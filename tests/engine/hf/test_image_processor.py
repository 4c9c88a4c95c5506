"""The processor with this package's preparation of images, against transformers'."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from hf_models import needs_processor
from idefics2_engine.hf import Idefics2ImageProcessor, Idefics2Processor
from idefics2_engine.images.tiling import make_tiles
from oracle import random_image
from paths import DEMO, EIGHT_B

SIZE = {"longest_edge": 98, "shortest_edge": 42}
PICTURES = [random_image(160, 107, 1), random_image(50, 187, 2), random_image(98, 60, 3)]
TEXTS = ["<image>a", "b<image><image>"]


@cache
def processors(folder: Path) -> tuple[Any, Any]:
    """Return transformers' processor, without torchvision, and this package's."""
    library: Any = transformers.Idefics2Processor
    own: Any = Idefics2Processor
    theirs = library.from_pretrained(folder)
    theirs.image_processor = Idefics2ImageProcessorPil(**theirs.image_processor.to_dict())
    return theirs, own.from_pretrained(folder)


def assert_same(got: Any, wanted: Any) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert type(got[name]) is type(values), name
        assert np.asarray(got[name]).dtype == np.asarray(values).dtype, name
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(values), err_msg=name)


@needs_processor
@pytest.mark.parametrize("folder", [DEMO, EIGHT_B], ids=["demo", "8b"])
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_inputs_equal_transformers_bit_for_bit(folder: Path, kind: str) -> None:
    theirs, ours = processors(folder)
    assert type(ours.image_processor) is Idefics2ImageProcessor
    arguments: dict[str, Any] = {
        "text": TEXTS,
        "images": PICTURES,
        "padding": True,
        "return_tensors": kind,
        "images_kwargs": {"size": SIZE},
    }
    assert_same(ours(**arguments), theirs(**arguments))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("resample", [0, 2, 3], ids=["nearest", "bilinear", "bicubic"])
def test_settings_of_a_call(split: bool, resample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "do_image_splitting": split,
        "resample": resample,
        "size": SIZE,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "rescale_factor": 1 / 200,
        "return_tensors": "pt",
    }
    images: Any = [PICTURES[:2], PICTURES[2:]]
    wanted = Idefics2ImageProcessorPil()(images, **settings)
    made = []

    def make(*arguments: Any, **settings: Any) -> Any:
        made.append(arguments)
        return make_tiles(*arguments, **settings)

    monkeypatch.setattr("idefics2_engine.hf.image_processor.make_tiles", make)
    assert_same(Idefics2ImageProcessor()(images, **settings), wanted)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        ([random_image(60, 50).convert("L")], {}),
        ([random_image(60, 50).convert("RGBA")], {}),
        ([torch.rand(3, 50, 60)], {"do_rescale": False}),
        ([np.random.default_rng(0).random((50, 60, 3))], {"do_rescale": False}),
        ([np.random.default_rng(0).random((50, 60, 3))], {}),
        ([random_image(60, 50)], {"do_normalize": False}),
        ([random_image(60, 50)], {"do_resize": False}),
        ([random_image(60, 50)], {"do_pad": False}),
        ([random_image(60, 50)], {"size": {"height": 30, "width": 40}}),
        ([random_image(60, 50)], {"image_mean": 0.5, "image_std": 0.25}),
    ],
    ids=[
        "gray",
        "alpha",
        "tensor",
        "floats",
        "floats-rescaled",
        "no-normalize",
        "no-resize",
        "no-pad",
        "box",
        "scalar",
    ],
)
def test_other_images_and_steps_equal_transformers(
    images: list[Any], settings: dict[str, Any]
) -> None:
    settings = {"size": SIZE, "return_tensors": "np"} | settings
    batch: Any = [images]
    wanted = Idefics2ImageProcessorPil()(batch, **settings)
    assert_same(Idefics2ImageProcessor()(batch, **settings), wanted)


def error_of(call: Any, *args: Any, **kwargs: Any) -> tuple[type, str]:
    with pytest.raises((ValueError, IndexError)) as caught:
        call(*args, **kwargs)
    return caught.type, str(caught.value)


@needs_processor
def test_bad_images_get_transformers_errors() -> None:
    theirs, ours = processors(EIGHT_B)
    for images in (PICTURES, []):
        wanted = error_of(theirs, images=images, text="<image>")
        assert error_of(ours, images=images, text="<image>") == wanted
    empty: Any
    for empty in ([[]], [[], []]):
        wanted = error_of(theirs.image_processor, empty)
        assert error_of(ours.image_processor, empty) == wanted


@needs_processor
def test_files_are_transformers(tmp_path: Path) -> None:
    _, ours = processors(DEMO)
    ours.save_pretrained(tmp_path)
    library: Any = transformers.Idefics2Processor
    again = library.from_pretrained(tmp_path)
    assert type(again.image_processor).__module__.startswith("transformers.")
    picture = Image.new("RGB", (60, 50), "red")
    again.image_processor = Idefics2ImageProcessorPil(**again.image_processor.to_dict())
    assert_same(ours(text="<image>a", images=picture), again(text="<image>a", images=picture))
