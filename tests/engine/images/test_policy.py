"""The result of every mode, format, rotation and animation under each policy."""

import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.errors import ConfigError, ImageError, ImageWarning
from idefics2_engine.images.loader import ImageSource, MediaConfig, load_image
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.tiling import ImageConfig, make_tiles, normalize
from paths import EIGHT_B
from pictures import (
    FORMATS,
    MODES,
    file,
    frames,
    noise,
    oriented,
    sixteen_bits,
    sixteen_bits_rgb,
    transparent_palette,
)

PARITY = MediaConfig(image_policy=ImagePolicy.PARITY)
CORRECT = MediaConfig(image_policy=ImagePolicy.CORRECT)
STRICT = MediaConfig(image_policy=ImagePolicy.STRICT)
SPLIT = pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])


def pixels(source: ImageSource, config: MediaConfig) -> Any:
    image = load_image(source, config)
    assert image.mode == "RGB"
    return np.array(image)


def opened(source: bytes | Image.Image) -> Any:
    return Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source


def load_with_transformers(source: bytes | Image.Image) -> Any:
    """Return the image that ``Idefics2Processor`` makes before it splits and resizes."""
    theirs: Any = Idefics2ImageProcessorPil()
    return theirs.convert_to_rgb(transformers_load_image(opened(source)))


def corpus() -> dict[str, Callable[[], bytes | Image.Image]]:
    """Return over sixty images: every mode, every format in each of its modes, and odd cases."""
    made: dict[str, Callable[[], bytes | Image.Image]] = {
        f"Pillow {mode}": lambda mode=mode, n=n: noise(11 + 30 * n, 397 - 17 * n, mode)  # type: ignore[misc]
        for n, mode in enumerate(MODES)
        # transformers cannot read this mode
        if mode != "La"
    }
    held = {
        "PNG": ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "WebP": ("RGB", "RGBA"),
        "GIF": ("1", "L", "P", "RGB"),
        "BMP": ("1", "L", "P", "RGB"),
        "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F", "I;16"),
        "PPM": ("1", "L", "RGB", "I"),
    }
    for kind, modes in held.items():
        for n, mode in enumerate(modes):
            made[f"{kind} {mode}"] = lambda kind=kind, mode=mode, n=n: file(  # type: ignore[misc]
                noise(401 - 31 * n, 5 + 70 * n, mode), kind
            )
    for orientation in range(1, 9):
        made[f"EXIF {orientation}"] = lambda o=orientation: oriented(noise(7, 390), "JPEG", o)  # type: ignore[misc]
    made |= {
        "EXIF of a PNG": lambda: oriented(noise(9, 12), "PNG", 6),
        "animated GIF": lambda: frames("GIF"),
        "animated WebP": lambda: frames("WebP"),
        "animated PNG": lambda: frames("PNG"),
        "TIFF of pages": lambda: frames("TIFF"),
        "progressive": lambda: file(noise(483, 391), "JPEG", progressive=True),
        "palette": transparent_palette,
        "palette of alphas": lambda: file(
            noise(19, 13).quantize(16), "PNG", transparency=bytes(range(0, 256, 16))
        ),
        "transparent gray": lambda: file(noise(16, 16, "L"), "PNG", transparency=9),
        "transparent RGB": lambda: file(
            noise(8, 8).quantize(4).convert("RGB"), "PNG", transparency=(9, 9, 9)
        ),
        "transparent GIF": lambda: file(noise(19, 13).quantize(16), "GIF", transparency=2),
        "16 bits RGB": sixteen_bits_rgb,
        "1x1": lambda: file(noise(1, 1), "PNG"),
        "1x10000": lambda: file(noise(1, 10000), "PNG"),
        "10000x1": lambda: file(noise(10000, 1), "PNG"),
    }
    return made


CORPUS = corpus()


def test_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 60


# transformers' reading warns
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning:PIL")
@SPLIT
@pytest.mark.parametrize("name", CORPUS)
def test_parity_equals_transformers_bit_for_bit(name: str, split: bool) -> None:
    source = CORPUS[name]()
    settings = json.loads((EIGHT_B / "preprocessor_config.json").read_text())
    config = ImageConfig.load(EIGHT_B)
    config = ImageConfig(**{**vars(config), "split": split})
    tiles = make_tiles(load_image(source, PARITY), config, patch_size=14, grid_side=70)
    # transformers divides by zero, so there is nothing to compare with
    if "1" in name.split("x") and split:
        assert len(tiles) == 5
        return
    for key in ("processor_class", "image_processor_type"):
        del settings[key]
    oracle: Any = Idefics2ImageProcessorPil(**settings | {"do_image_splitting": split})
    wanted = oracle([[transformers_load_image(opened(source))]], return_tensors="np")
    assert len(tiles) == len(wanted.pixel_values[0])
    for tile, values, mask in zip(
        tiles, wanted.pixel_values[0], wanted.pixel_attention_mask[0], strict=True
    ):
        height, width, _ = tile.pixels.shape
        assert mask.sum() == height * width
        np.testing.assert_array_equal(normalize(tile, config), values[:, :height, :width])


def test_premultiplied_mode_la_is_read() -> None:
    image = noise(6, 5, "La")
    with pytest.raises(ValueError, match="conversion"):
        transformers_load_image(image)
    wanted = np.array(image.convert("LA").convert("RGB"))
    np.testing.assert_array_equal(pixels(image, PARITY), wanted)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_correct_shows_alpha_on_white(mode: str) -> None:
    image = noise(31, 22, mode)
    straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert("RGBA")
    values = np.array(straight).astype(np.float64)
    alpha = values[:, :, 3:] / 255
    wanted = alpha * values[:, :, :3] + (1 - alpha) * 255
    assert np.abs(pixels(image, CORRECT) - wanted).max() <= 1
    # The result also equals that of transformers' image processor exactly
    if mode in ("RGBA", "LA", "PA"):
        theirs: Any = Idefics2ImageProcessorPil(
            do_resize=False, do_rescale=False, do_normalize=False
        )
        whole = theirs([[image]], return_tensors="np").pixel_values[0, 0].transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels(image, CORRECT), whole)


def test_correct_shows_the_transparent_palette_color_as_white() -> None:
    data = transparent_palette()
    clear = np.array(opened(data)) == 3
    assert clear.any()
    got = pixels(data, CORRECT)
    assert (got[clear] == 255).all()
    np.testing.assert_array_equal(got[~clear], load_with_transformers(data)[~clear])


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L", "I;16N"])
def test_correct_scales_16_bits(mode: str) -> None:
    image = noise(40, 30, mode)
    wanted = np.rint(np.asarray(image).astype(np.float64) / 257)
    assert wanted.min() < 20
    assert wanted.max() > 235
    for channel in range(3):
        np.testing.assert_array_equal(pixels(image, CORRECT)[:, :, channel], wanted)
    # A mostly white result is the reason for the other policy
    assert (load_with_transformers(image) == 255).mean() > 0.9


def test_correct_scales_floats_and_refuses_others() -> None:
    image = noise(12, 9, "F")
    wanted = np.rint(np.asarray(image) * np.float32(255))
    np.testing.assert_array_equal(pixels(image, CORRECT)[:, :, 1], wanted)
    for value in (1.5, -0.1, float("nan"), float("inf")):
        bad = Image.fromarray(np.full((2, 2), value, np.float32))
        with pytest.raises(ImageError, match=r"floats must lie in \[0, 1\]"):
            load_image(bad, CORRECT)
    with pytest.raises(ImageError, match=r"must lie in \[0, 65535\], got 0 to 65536"):
        load_image(Image.fromarray(np.array([[0, 65536]], np.int32)), CORRECT)


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_correct_scales_in_parts(mode: str) -> None:
    image = noise(900, 700, mode)
    tracemalloc.start()
    try:
        load_image(image, CORRECT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Bytes a pixel of the gray image and of the RGB image
    of_pillow = 1 + 4
    assert peak / (900 * 700) + of_pillow <= 16


def test_correct_respects_the_transparent_gray_of_16_bits() -> None:
    image = Image.fromarray(np.array([[0, 257, 514]], np.uint16))
    image.info["transparency"] = 257
    assert pixels(image, CORRECT)[0, :, 0].tolist() == [0, 255, 2]


@pytest.mark.parametrize("config", [PARITY, CORRECT], ids=["parity", "correct"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "TIFF"])
def test_every_rotation_is_undone(kind: str, config: MediaConfig) -> None:
    upright = np.kron(np.array([[0, 60, 120], [180, 220, 255]]), np.ones((8, 8))).astype(np.uint8)
    # With these contents, undoing the orientation gives ``upright``
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright, 1), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }  # fmt: skip
    for orientation, turned in stored.items():
        data = oriented(Image.fromarray(turned).convert("RGB"), kind, orientation)
        got = pixels(data, config)[:, :, 0]
        assert got.shape == upright.shape
        # JPEG and WebP are lossy
        assert np.abs(got.astype(int) - upright).max() <= 12


@pytest.mark.parametrize("kind", ["GIF", "WebP", "PNG", "TIFF"])
def test_policies_on_several_frames(kind: str) -> None:
    data = frames(kind)
    first = load_with_transformers(data)
    np.testing.assert_array_equal(pixels(data, PARITY), first)
    with pytest.warns(ImageWarning, match="image bytes: has several frames or pages"):
        np.testing.assert_array_equal(pixels(data, CORRECT), first)
    with pytest.raises(ImageError, match="strict' refuses several frames"):
        load_image(data, STRICT)


def test_warning_turned_into_an_error_keeps_its_class() -> None:
    # The suite turns warnings into errors
    with pytest.raises(ImageWarning):
        load_image(frames("GIF"), CORRECT)


@pytest.mark.parametrize("kind", FORMATS)
def test_strict_accepts_plain_files(kind: str) -> None:
    data = file(noise(30, 20), kind)
    np.testing.assert_array_equal(pixels(data, STRICT), load_with_transformers(data))
    gray = file(noise(30, 20, "L"), kind)
    np.testing.assert_array_equal(pixels(gray, STRICT), load_with_transformers(gray))


@pytest.mark.parametrize(
    ("source", "doubt"),
    [
        *(
            (noise(3, 4, mode), "transparency" if "a" in mode.lower() else f"mode {mode}")
            for mode in MODES
            if mode not in ("1", "L", "P", "RGB", "LAB")
        ),
        (noise(3, 4, "LAB"), "mode LAB"),
        (transparent_palette(), "transparency"),
        (sixteen_bits(), "16 bits a channel"),
        (sixteen_bits_rgb(), "16 bits a channel"),
        (opened(sixteen_bits_rgb()), "16 bits a channel"),
        (file(noise(8, 8, "CMYK"), "JPEG"), "mode CMYK"),
        (oriented(noise(8, 8), "JPEG", 3), "EXIF orientation 3"),
        *((file(noise(64, 64), kind)[:-12], f"a {kind} cut off") for kind in ("JPEG", "PNG")),
    ],
)
def test_strict_refuses_ambiguous_images(source: ImageSource, doubt: str) -> None:
    with pytest.raises(ImageError, match=f"image_policy='strict' refuses {doubt}"):
        load_image(source, STRICT)


def test_strict_finds_a_flipped_bit_in_a_png() -> None:
    data = bytearray(file(noise(16, 16), "PNG"))
    # The flipped bit is in or near the pixels' checksum, which a decoder does not check
    data[-20] ^= 1
    with pytest.raises(ImageError, match="image bytes"):
        load_image(bytes(data), STRICT)


def test_source_images_are_not_changed() -> None:
    image = opened(oriented(noise(8, 4), "PNG", 6))
    load_image(image, CORRECT)
    assert image.size == (8, 4)
    assert image.getexif()[0x0112] == 6
    plain = noise(3, 3)
    # An image that needs no change is not copied
    assert load_image(plain, PARITY) is plain


@pytest.mark.parametrize("kind", ["WebP", "PNG", "GIF", "TIFF"])
def test_loaded_image_is_plain_and_loads_unchanged(kind: str) -> None:
    with pytest.warns(ImageWarning):
        image = load_image(frames(kind), CORRECT)
    assert type(image) is Image.Image
    # The command line reads images before the model, so they pass through here twice
    for config in (
        PARITY,
        CORRECT,
        STRICT,
    ):
        assert load_image(image, config) is image


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of 'parity', 'correct', 'strict', got 'x'"):
        ImagePolicy.named("x")
