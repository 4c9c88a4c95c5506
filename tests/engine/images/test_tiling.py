"""Tiles against transformers' processor, bit for bit, and the rule of trained positions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.errors import ConfigError, ImageError
from idefics2_engine.images.tiling import (
    ImageConfig,
    Tile,
    make_tiles,
    normalize,
    resized_size,
    split_boxes,
)
from paths import EIGHT_B

CONFIG = ImageConfig.load(EIGHT_B)

# Sizes on both sides of every branch of the size rule, and sides that no patch or half divides
SIZES = [
    (2, 2), (3, 5), (7, 2), (2, 31), (13, 13), (101, 57), (333, 377), (377, 378), (379, 377),
    (501, 499), (641, 479), (755, 1001), (979, 981), (981, 979), (981, 981), (980, 3), (3, 980),
    (1003, 4), (5, 1201), (1023, 767), (767, 1025), (1111, 1113), (1500, 211), (199, 1499),
    (1961, 1307), (391, 1963), (1959, 1961), (423, 1017), (1399, 1401), (2001, 9),
]  # fmt: skip


def noise(width: int, height: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng([width, height])
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def oracle(split: bool, **changes: Any) -> Any:
    settings = json.loads((EIGHT_B / "preprocessor_config.json").read_text())
    for key in ("processor_class", "image_processor_type"):
        del settings[key]
    return Idefics2ImageProcessorPil(**settings | {"do_image_splitting": split} | changes)


def config(folder: Path, **values: Any) -> ImageConfig:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return ImageConfig.load(folder)


def test_number_of_sizes_is_thirty() -> None:
    assert len(set(SIZES)) == 30


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_equal_transformers(size: tuple[int, int], split: bool, tmp_path: Path) -> None:
    image = Image.fromarray(noise(*size))
    wanted = oracle(split)([[image]], return_tensors="np")
    settings = config(tmp_path, do_image_splitting=split)
    tiles = make_tiles(image, settings, patch_size=14, grid_side=70)
    assert len(tiles) == len(wanted.pixel_values[0]) == (5 if split else 1)
    masked = zip(tiles, wanted.pixel_values[0], wanted.pixel_attention_mask[0], strict=True)
    for tile, pixels, mask in masked:
        height, width = mask.any(axis=1).sum(), mask.any(axis=0).sum()
        got = normalize(tile, settings)
        assert got.dtype == pixels.dtype
        assert got.shape == (3, height, width)
        np.testing.assert_array_equal(got, pixels[:, :height, :width])


def test_normalization_equals_transformers_in_every_value_and_channel(tmp_path: Path) -> None:
    values = {
        "rescale_factor": 0.0123,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    ramp = np.concatenate([ramp, ramp[::-1], ramp.transpose(1, 0, 2)], axis=2)
    wanted = oracle(False, do_resize=False, **values)([[Image.fromarray(ramp)]])
    got = normalize(Tile(ramp, 14, 70), config(tmp_path, **values))
    np.testing.assert_array_equal(got, wanted["pixel_values"][0, 0])


@pytest.mark.parametrize("resample", [0, 1, 3])
def test_resize_filter_is_the_checkpoints(resample: int, tmp_path: Path) -> None:
    image = Image.fromarray(noise(301, 555))
    wanted = oracle(False, resample=resample)([[image]])["pixel_values"][0, 0]
    settings = config(tmp_path, resample=resample)
    (tile,) = make_tiles(image, settings, patch_size=14, grid_side=70)
    np.testing.assert_array_equal(normalize(tile, settings), wanted)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        # Both sides grow, and the aspect ratio changes
        ((100, 50), (378, 378)),
        ((980, 980), (980, 980)),
        # Nothing changes
        ((500, 400), (500, 400)),
        ((1960, 1000), (980, 500)),
        ((1000, 1960), (500, 980)),
        ((3000, 100), (980, 378)),
        # 979.02 is rounded down
        ((999, 998), (980, 979)),
    ],
)
def test_size_rule(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert resized_size(*size, 980, 378) == wanted


def test_split_gives_four_quarters_and_the_image() -> None:
    pixels = noise(7, 5)
    parts = [pixels[top:bottom, left:right] for left, top, right, bottom in split_boxes(7, 5)]
    wanted = [pixels[:2, :3], pixels[:2, 3:], pixels[2:, :3], pixels[2:, 3:], pixels]
    for got, part in zip(parts, wanted, strict=True):
        np.testing.assert_array_equal(got, part)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 2)])
def test_one_pixel_splits_into_itself(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    image = Image.fromarray(noise(width, height))
    boxes = split_boxes(width, height)
    sizes = [(right - left, bottom - top) for left, top, right, bottom in boxes]
    halves = [max(side // 2, 1) for side in size]
    rests = [side - side // 2 for side in size]
    assert sizes[0] == tuple(halves)
    assert sizes[3] == tuple(rests)
    assert sizes[4] == size
    tiles = make_tiles(image, config(tmp_path, do_image_splitting=True), 14, 70)
    assert [tile.pixels.shape for tile in tiles] == [(378, 378, 3)] * 5
    assert (tiles[4].pixels.min(axis=(0, 1)) >= np.array(image).min(axis=(0, 1))).all()
    if size == (1, 1):
        for tile in tiles:
            assert (tile.pixels == np.array(image)).all()


def test_buckets_equal_those_of_training() -> None:
    trained = json.loads((EIGHT_B / "position_buckets.json").read_text())["buckets"]
    assert len(trained) == 70
    for count in range(1, 71):
        column = Tile(np.zeros((14, 14 * count, 3), np.uint8), 14, 70)
        row = Tile(np.zeros((14 * count, 14, 3), np.uint8), 14, 70)
        assert column.position_ids().tolist() == trained[str(count)]
        assert row.position_ids().tolist() == [70 * bucket for bucket in trained[str(count)]]
        assert column.position_ids().dtype == np.int64


def test_buckets_do_not_depend_on_torch_defaults() -> None:
    # No other test has this grid, so it is not cached
    tile = Tile(np.zeros((14, 14 * 49, 3), np.uint8), 14, 77)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = tile.position_ids()
    finally:
        torch.set_default_dtype(torch.float32)
    step = float(1 / torch.tensor(49))
    wanted = torch.bucketize(
        torch.arange(0, 1 - 1e-6, step), torch.arange(1 / 77, 1, 1 / 77), right=True
    )
    assert got.tolist() == wanted.tolist()


def test_full_side_has_positions_in_order() -> None:
    for grid_side in range(1, 100):
        ids = Tile(np.zeros((2, 2 * grid_side, 3), np.uint8), 2, grid_side).position_ids()
        assert len(ids) == grid_side
        assert (np.diff(ids) >= 0).all()
        # float32 moves some of them by one
        assert np.abs(ids - np.arange(grid_side)).max() <= 1
        assert ids.max() < grid_side


def test_only_whole_patches_count() -> None:
    pixels = noise(14 * 3 + 13, 14 * 2 + 1)
    tile = Tile(pixels, 14, 70)
    assert tile.grid == (2, 3)
    assert tile.num_patches == 6
    crop = tile.patch_pixels()
    assert crop.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(crop, pixels[:28, :42])
    assert tile.position_ids().tolist() == [0, 23, 46, 35 * 70, 35 * 70 + 23, 35 * 70 + 46]


def test_more_patches_than_positions_is_an_error() -> None:
    tile = Tile(np.zeros((14, 14 * 71, 3), np.uint8), 14, 70)
    with pytest.raises(ImageError, match="at most 70 x 70 patches have a position, got 1 x 71"):
        tile.position_ids()


def test_changing_returned_positions_has_no_effect() -> None:
    tile = Tile(np.zeros((28, 28, 3), np.uint8), 14, 70)
    tile.position_ids()[:] = -1
    assert tile.position_ids().tolist() == [0, 35, 35 * 70, 35 * 70 + 35]


def test_config_is_the_checkpoints() -> None:
    half = (0.5, 0.5, 0.5)
    assert ImageConfig(980, 378, True, 2, 0.00392156862745098, half, half) == CONFIG
    assert CONFIG.tiles_per_image == 5


def test_config_defaults_equal_transformers(tmp_path: Path) -> None:
    default = Idefics2ImageProcessorPil()
    got = config(tmp_path)
    assert got.split is default.do_image_splitting is False
    assert got.tiles_per_image == 1
    assert got.resample == default.resample
    assert got.rescale_factor == default.rescale_factor
    assert list(got.mean) == list(default.image_mean)
    assert list(got.std) == list(default.image_std)
    assert got.longest_edge == default.size["longest_edge"]
    assert got.shortest_edge == default.size["shortest_edge"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_resize", False),
        ("do_normalize", 0),
        ("do_image_splitting", "yes"),
        ("resample", 9),
        ("resample", 2.0),
        ("size", {"height": 3, "width": 3}),
        ("size", {"longest_edge": 100, "shortest_edge": 378}),
        ("size", {"longest_edge": 100, "shortest_edge": 0}),
        ("size", 980),
        ("rescale_factor", 0),
        ("rescale_factor", float("nan")),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, 0.5, True]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", 0.5),
    ],
)
def test_invalid_config_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {key} must be"):
        config(tmp_path, **{key: value})


def test_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: cannot be read"):
        ImageConfig.load(tmp_path)
