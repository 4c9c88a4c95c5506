"""Arrays and tensors: accepted shapes and values, and parity with the image processor."""

import subprocess
import sys
import tracemalloc
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.errors import ImageError
from idefics2_engine.images import pixel_parts
from idefics2_engine.images.loader import ImageSource, MediaConfig, load_image
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.tiling import ImageConfig, make_tiles, normalize

EVERY = tuple(ImagePolicy)
PARITY, CORRECT, STRICT = EVERY
HALF = (0.5, 0.5, 0.5)


def values(*shape: int, high: int = 256) -> npt.NDArray[np.int64]:
    return np.random.default_rng(shape).integers(0, high, shape)


def rgb(source: ImageSource, policy: ImagePolicy) -> Any:
    return np.array(load_image(source, MediaConfig(image_policy=policy)))


ARRAYS: dict[str, npt.NDArray[Any]] = {
    "uint8 HWC": values(31, 401, 3).astype(np.uint8),
    "uint8 CHW": values(3, 31, 401).astype(np.uint8),
    "uint8 gray HWC": values(9, 14, 1).astype(np.uint8),
    "uint8 gray CHW": values(1, 9, 14).astype(np.uint8),
    "uint8 alpha HWC": values(23, 17, 4).astype(np.uint8),
    "uint8 alpha CHW": values(4, 23, 17).astype(np.uint8),
    "both ends": values(3, 50, 3).astype(np.uint8),
    "both ends, small": values(3, 2, 3).astype(np.uint8),
    "strided": values(60, 60, 3).astype(np.uint8)[::2, ::-1],
    "int64": values(20, 21, 3),
    "int64 alpha": values(20, 21, 4),
    "uint16 of 8 bits": values(20, 21, 3).astype(np.uint16),
    "bool": values(20, 21, 3, high=2).astype(np.bool_),
    "float of whole numbers": values(20, 21, 3).astype(np.float32),
    "float of zeros and ones": values(20, 21, 3, high=2).astype(np.float64),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("name", ARRAYS)
def test_parity_equals_the_image_processor_bit_for_bit(name: str, kind: str, split: bool) -> None:
    array = ARRAYS[name]
    if kind == "tensor" and name == "strided":
        # torch has no negative strides
        array = array[:, ::-1]
    source: Any = torch.from_numpy(array) if kind == "tensor" else array
    oracle: Any = Idefics2ImageProcessorPil(do_image_splitting=split)
    wanted = oracle([[source]], return_tensors="np")
    config = ImageConfig(980, 378, split, 2, 1 / 255, HALF, HALF)
    tiles = make_tiles(load_image(source), config, 14, 70)
    for tile, pixels in zip(tiles, wanted.pixel_values[0], strict=True):
        height, width, _ = tile.pixels.shape
        np.testing.assert_array_equal(normalize(tile, config), pixels[:, :height, :width])


def test_parity_refuses_floats_that_transformers_divides_twice() -> None:
    picture = values(30, 30, 3) / 255
    oracle: Any = Idefics2ImageProcessorPil()
    seen = oracle([[picture]], return_tensors="np").pixel_values
    # The image is black
    assert seen.max() < -0.99
    with pytest.raises(ImageError, match="divides by 255 twice; pass uint8, or choose"):
        load_image(picture)
    np.testing.assert_array_equal(rgb(picture, CORRECT), values(30, 30, 3))


@pytest.mark.parametrize("policy", [CORRECT, STRICT])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "bfloat16"])
def test_eight_bits_survive_every_type(dtype: str, policy: ImagePolicy) -> None:
    pixels = values(16, 17, 3).astype(np.uint8)
    array = pixels if dtype == "uint8" else None
    tensor = torch.from_numpy(pixels.copy())
    if dtype != "uint8":
        tensor = tensor.double().div(255).to(getattr(torch, dtype))
        array = None if dtype == "bfloat16" else tensor.numpy()
    if array is not None:
        np.testing.assert_array_equal(rgb(array, policy), pixels)
    # bfloat16 has 8 bits, and above a half one of them is lost
    error = 1 if dtype == "bfloat16" else 0
    got = rgb(tensor.permute(2, 0, 1), policy)
    assert np.abs(got.astype(int) - pixels).max() <= error


def test_correct_scales_and_blends() -> None:
    deep = values(9, 8, 3, high=65536).astype(np.uint16)
    np.testing.assert_array_equal(rgb(deep, CORRECT), np.rint(deep / 257))
    mask = values(9, 8, high=2).astype(np.bool_)
    np.testing.assert_array_equal(rgb(mask, CORRECT)[:, :, 2], mask * 255)
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (rgb(clear, CORRECT) == 255).all()
    half = np.full((2, 2, 4), 0.5)
    assert (np.abs(rgb(half, CORRECT).astype(int) - 191) <= 1).all()


@pytest.mark.parametrize("policy", EVERY)
def test_gray_needs_no_channel_axis(policy: ImagePolicy) -> None:
    gray = values(7, 11).astype(np.uint8)
    np.testing.assert_array_equal(rgb(gray, policy), np.repeat(gray[:, :, None], 3, axis=2))


def test_ambiguous_channel_axis_follows_the_policy() -> None:
    array = values(3, 50, 3).astype(np.uint8)
    lead, last = array.transpose(1, 2, 0), array
    np.testing.assert_array_equal(rgb(array, PARITY), lead)
    np.testing.assert_array_equal(rgb(torch.from_numpy(array), PARITY), lead)
    np.testing.assert_array_equal(rgb(array, CORRECT), last)
    np.testing.assert_array_equal(rgb(torch.from_numpy(array), CORRECT), lead)
    with pytest.raises(ImageError, match="refuses a shape with channels at either end"):
        rgb(array, STRICT)


NAN = np.array([[0.0, np.nan]])


@pytest.mark.parametrize(
    ("array", "policies", "message"),
    [
        (NAN, EVERY, "must be finite"),
        (np.array([[0.0, np.inf]]), EVERY, "must be finite"),
        (np.zeros((4, 4), complex), EVERY, "must hold numbers, got complex128"),
        (np.zeros((4, 4), object), EVERY, "must hold numbers, got object"),
        (np.zeros((4, 4), "M8[s]"), EVERY, "must hold numbers"),
        (np.zeros((5, 4, 2), np.uint8), EVERY, r"1, 3 or 4 channels, got shape \(5, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), EVERY, r"got shape \(2, 4, 4, 3\)"),
        (np.zeros(3, np.uint8), EVERY, r"got shape \(3,\)"),
        (np.zeros((), np.uint8), EVERY, r"got shape \(\)"),
        (np.zeros((0, 4, 3), np.uint8), EVERY, r"must have pixels, got shape \(0, 4, 3\)"),
        (np.zeros((0, 4)), EVERY, r"must have pixels"),
        (np.full((4, 4), 256), (PARITY,), "whole numbers from 0 to 255, got 256 to 256"),
        (np.full((4, 4), -1), (PARITY,), "whole numbers from 0 to 255"),
        (np.array([[0.5, 200.0]]), (PARITY,), "whole numbers from 0 to 255, got 0.5 to 200"),
        (np.full((5, 5, 4), 2.0), (PARITY, CORRECT), r"must lie in \[0, 1\]"),
        (np.array([[0.5, 200.0]]), (CORRECT, STRICT), r"must lie in \[0, 1\], got 0.5 to 200"),
        (np.zeros((4, 4), int), (CORRECT,), "must be uint8, uint16, bool or float, got int64"),
        (np.zeros((4, 4), np.uint16), (STRICT,), "must be uint8 or float, got uint16"),
        (np.zeros((4, 4), np.bool_), (STRICT,), "must be uint8 or float, got bool"),
        (np.zeros((9, 9, 4), np.uint8), (STRICT,), "refuses transparency"),
    ],
)
def test_invalid_arrays_are_refused(
    array: npt.NDArray[Any], policies: tuple[ImagePolicy, ...], message: str
) -> None:
    for policy in policies:
        with pytest.raises(ImageError, match=f"image array: .*({message})"):
            rgb(array, policy)


def test_pixel_limit_applies_to_arrays() -> None:
    with pytest.raises(ImageError, match="image array: must have at most 99 pixels, got 10 x 10"):
        load_image(np.zeros((10, 10), np.uint8), MediaConfig(max_image_pixels=99))


# Height and width are no multiples of the parts that are converted at once
MEASURED = 700, 900
DTYPES = (
    "uint8", "bool", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64", "longdouble",
)  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "gray": MEASURED,
    "RGB": (*MEASURED, 3),
    "alpha": (*MEASURED, 4),
    "alpha, channels first": (4, *MEASURED),
    "one row": (1, MEASURED[0] * MEASURED[1], 4),
    "one column": (MEASURED[0] * MEASURED[1], 1, 4),
}


@pytest.mark.parametrize("policy", [PARITY, CORRECT])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_use_at_most_16_bytes_a_pixel(dtype: str, shape: str, policy: ImagePolicy) -> None:
    if policy is CORRECT and dtype in ("int32", "int64", "uint64"):
        # transformers refuses this case
        return
    array = np.zeros(SHAPES[shape], dtype)
    tracemalloc.start()
    try:
        load_image(array, MediaConfig(image_policy=policy))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Bytes a pixel of the image itself, which tracemalloc does not see
    of_pillow = 4
    assert peak / (MEASURED[0] * MEASURED[1]) + of_pillow <= 16


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that torch allocates, without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            given = [one.untyped_storage() for one in args if isinstance(one, torch.Tensor)]
            if all(storage.data_ptr() != one.data_ptr() for one in given):
                self.bytes = max(self.bytes, storage.nbytes())
        return made


@pytest.mark.parametrize("shape", ["alpha", "alpha, channels first", "one row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_tensors_are_widened_in_parts(dtype: torch.dtype, shape: str) -> None:
    tensor = torch.zeros(SHAPES[shape], dtype=dtype)
    with Largest() as largest:
        load_image(tensor)
    # This is a byte a pixel. Converted as a whole it would be 16.
    assert largest.bytes <= MEASURED[0] * MEASURED[1]


@pytest.mark.parametrize("shape", [(3, 20_000, 10_000), (20_000, 10_000, 3), (200_000_000, 2)])
def test_size_is_checked_before_values(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(1, dtype=torch.bfloat16).expand(shape)
    with Largest() as largest, pytest.raises(ImageError, match="image tensor: must have at most"):
        load_image(tensor)
    assert largest.bytes == 0
    array = np.broadcast_to(np.float16(0), shape)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="image array: must have at most"):
            load_image(array)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_part_size_changes_no_pixel(dtype: str, policy: ImagePolicy, monkeypatch: Any) -> None:
    high = 65536 if dtype == "uint16" and policy is CORRECT else 2 if dtype == "bool" else 256
    for shape in ((37, 41), (37, 41, 3), (3, 41, 37), (41, 37, 4), (1, 1500, 4), (1500, 1, 3)):
        array = values(*shape, high=high).astype(dtype)
        if array.dtype.kind == "f" and (policy is not PARITY or 4 in shape):
            array = (array / 255).astype(dtype)
            if policy is PARITY:
                # These values blend to whole numbers
                array = np.rint(array)
        seen = []
        for size in (1, 100, 1 << 14, 1 << 30):
            monkeypatch.setattr(pixel_parts, "PART_PIXELS", size)
            try:
                seen.append(rgb(array, policy))
            except ImageError as error:
                seen.append(str(error))
        for one in seen[:-1]:
            np.testing.assert_array_equal(one, seen[-1])


def test_invalid_values_in_the_last_part_are_found() -> None:
    array = values(300, 200, 3).astype(np.float64)
    array[-1, -1, -1] = np.nan
    with pytest.raises(ImageError, match="must be finite"):
        load_image(array)
    array[-1, -1, -1] = 255.5
    with pytest.raises(ImageError, match=r"whole numbers from 0 to 255, got 0 to 255\.5"):
        load_image(array)
    array[0, 0, 0] = 0.5
    array[-1, -1, -1] = 255
    with pytest.raises(ImageError, match="whole numbers from 0 to 255, got 0 to 255"):
        load_image(array)
    with pytest.raises(ImageError, match=r"must lie in \[0, 1\], got 0 to 255"):
        load_image(array, MediaConfig(image_policy=CORRECT))


@pytest.mark.parametrize("mask", [np.ma.nomask, True, False])
def test_masked_arrays_are_refused(mask: Any) -> None:
    masked: Any = np.ma.masked_array(values(4, 5, 3).astype(np.uint8), mask=mask)
    for policy in EVERY:
        with pytest.raises(ImageError, match="image array: must have no mask, got a masked array"):
            rgb(masked, policy)


def test_masked_tensors_are_refused() -> None:
    with warnings.catch_warnings():
        # Nested tensors warn that they are a prototype
        warnings.simplefilter("ignore")
        masked: Any = torch.masked.masked_tensor(torch.ones(4, 4), torch.ones(4, 4) > 0)
        with pytest.raises(ImageError, match="image tensor: must be a dense tensor"):
            load_image(masked)


def test_tensors_without_values_are_refused() -> None:
    for tensor in (torch.empty(3, 4, 4, device="meta"), torch.ones(4, 4).to_sparse()):
        with pytest.raises(ImageError, match="image tensor: must be a dense tensor with values"):
            load_image(tensor)


def test_tensors_with_gradients_are_read() -> None:
    tensor = torch.full((3, 4, 4), 255.0, requires_grad=True)
    assert (rgb(tensor, PARITY) == 255).all()


def test_arrays_do_not_import_torch() -> None:
    script = (
        "import sys, numpy; from idefics2_engine.images.loader import load_image;"
        "load_image(numpy.zeros((3, 4), numpy.uint8)); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
