"""Drafts own their content, and threads can share one object among several rows."""

import copy
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from idefics2_engine.errors import ImageError, PromptError
from idefics2_engine.images import loader as media
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor, PromptDraft
from paths import EIGHT_B
from pictures import file, frames, noise

IMAGE = noise(31, 23)
OTHER = noise(23, 31).resize((31, 23))
Held = tuple[Any, Callable[[], object]]
"""A source of ``IMAGE``, and a function that later changes it to ``OTHER`` or breaks it."""


@cache
def processor() -> Processor:
    return Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split=False)


def pixels(prompt: ProcessedPrompt) -> list[npt.NDArray[np.uint8]]:
    return [tile.pixels for tile in prompt.tiles]


def finished(draft: PromptDraft) -> list[npt.NDArray[np.uint8]]:
    return pixels(processor().finish([draft])[0])


def expected_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    (only,) = finished(processor().draft_prompt("<image>", [image.copy()]))
    return only


def array(dtype: Any) -> Held:
    values = np.array(IMAGE).astype(dtype)
    return values, lambda: values.__setitem__(..., np.array(OTHER))


def tensor(dtype: torch.dtype) -> Held:
    values = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1).to(dtype)
    return values, lambda: values.zero_()


def buffer(view: bool) -> Held:
    data = bytearray(file(IMAGE, "BMP"))
    changed = file(OTHER, "BMP")
    return memoryview(data) if view else data, lambda: data.__setitem__(slice(None), changed)


def opened() -> Held:
    stream = io.BytesIO(file(IMAGE, "PNG"))
    return stream, lambda: (stream.seek(0), stream.truncate())


def loaded() -> Held:
    image = IMAGE.copy()
    return image, lambda: image.paste(OTHER)


def lazy() -> Held:
    stream = io.BytesIO(file(IMAGE, "PNG"))
    image = Image.open(stream)
    return image, stream.close


def stored() -> Held:
    row = {"bytes": file(IMAGE, "PNG"), "path": None}
    return row, lambda: row.update(bytes=file(OTHER, "PNG"))


def stored_buffer() -> Held:
    data, change = buffer(view=False)
    return {"bytes": data}, change


HELD: dict[str, Callable[[], Held]] = {
    "uint8 array": lambda: array(np.uint8),
    "int64 array": lambda: array(np.int64),
    "float array": lambda: array(np.float32),
    "uint8 tensor": lambda: tensor(torch.uint8),
    "bfloat16 tensor": lambda: tensor(torch.bfloat16),
    "bytearray": lambda: buffer(view=False),
    "memoryview": lambda: buffer(view=True),
    "BytesIO": opened,
    "loaded Pillow image": loaded,
    "lazy Pillow image": lazy,
    "dict": stored,
    "dict of a bytearray": stored_buffer,
}


@pytest.mark.parametrize("kind", HELD)
def test_owned_draft_does_not_see_the_callers_changes(kind: str) -> None:
    source, change = HELD[kind]()
    images = [source]
    messages = [{"role": "user", "content": [{"type": "image", "image": source}]}]
    drafts = [
        processor().draft_prompt("<image>", images).owned(),
        processor().draft_chat(messages).owned(),
    ]
    change()
    images.clear()
    messages[0]["content"][0]["image"] = None  # type: ignore[index]
    for draft in drafts:
        (got,) = finished(draft)
        np.testing.assert_array_equal(got, expected_pixels(IMAGE))


def test_messages_and_token_ids_may_be_reused() -> None:
    text: dict[str, Any] = {"type": "text", "text": "one"}
    messages = [{"role": "user", "content": [text]}]
    ids = [1, 5, 6]
    numbers = np.array(ids)
    drafts = [
        processor().draft_chat(messages).owned(),
        processor().draft_token_prompt(ids).owned(),
        processor().draft_token_prompt(numbers).owned(),  # type: ignore[arg-type]
    ]
    before = copy.deepcopy([(draft.prompt, draft.token_ids) for draft in drafts])
    text["text"] = "two"
    messages.clear()
    ids.append(7)
    numbers[:] = 9
    assert [(draft.prompt, draft.token_ids) for draft in drafts] == before


@pytest.mark.parametrize("kind", ["GIF", "WebP", "PNG", "TIFF"])
def test_frames_of_one_file_are_read_separately(kind: str) -> None:
    animated = Image.open(io.BytesIO(frames(kind)))
    drafts, expected = [], []
    for number in range(3):
        animated.seek(number)
        drafts.append(processor().draft_prompt("<image>", [animated]).owned())
        expected.append(expected_pixels(animated))
    got = [finished(draft)[0] for draft in drafts]
    assert len({one.tobytes() for one in got}) == 3
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_paths_and_bytes_are_not_decoded_when_owned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    IMAGE.save(tmp_path / "a.png")
    sources: list[Any] = [tmp_path / "a.png", str(tmp_path / "a.png"), file(IMAGE, "PNG")]
    with monkeypatch.context() as patch:
        patch.setattr(media, "decode", lambda *_: pytest.fail("decoded when it was read"))
        draft = processor().draft_prompt("<image>" * 3, sources).owned()
    assert all(one is own for one, own in zip(sources, draft.images, strict=True))
    for got in finished(draft):
        np.testing.assert_array_equal(got, expected_pixels(IMAGE))


def test_repeated_object_is_owned_once() -> None:
    draft = processor().draft_prompt("<image>" * 3, [IMAGE, OTHER, IMAGE]).owned()
    first, second, third = draft.images
    assert first is third
    assert first is not IMAGE
    assert second is not OTHER


def test_error_while_owning_names_the_image() -> None:
    bad: Any = np.zeros((2, 5, 5))
    with pytest.raises(ImageError, match=r"^images\[1\]: image array: must be"):
        processor().draft_prompt("<image>" * 2, [IMAGE, bad]).owned()
    with pytest.raises(ImageError, match=r"^image array: must be"):
        processor().draft_prompt("<image>", [bad]).owned()


def test_sizes_are_checked_before_anything_is_copied() -> None:
    small = Processor.load(
        EIGHT_B,
        ModelConfig.load(EIGHT_B),
        media=MediaConfig(max_image_pixels=99, max_media_bytes=99),
    )
    endless = np.broadcast_to(np.float32(0), (30_000, 30_000))
    unread = Image.open(io.BytesIO(file(IMAGE, "PNG")))
    sources: list[Any] = [endless, unread, IMAGE, bytearray(100), io.BytesIO(bytes(100))]
    for source in sources:
        with pytest.raises(ImageError, match="must have at most 99"):
            small.draft_prompt("<image>", [source]).owned()
    # The source has lost none of its content
    assert unread.getbbox() is not None


# Tests of one object in several rows


class Watched(io.BytesIO):
    """A file whose reads wait a moment for a second reader, and record whether one came."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.met = threading.Event()
        self._readers = 0
        self._lock = threading.Lock()

    def read(self, size: int | None = -1) -> bytes:
        with self._lock:
            self._readers += 1
            if self._readers > 1:
                self.met.set()
        self.met.wait(0.01)
        with self._lock:
            self._readers -= 1
        return super().read(size)


def one_lazy_image(stream: Watched) -> Iterator[Any]:
    image = Image.open(stream)
    while True:
        yield image


def images_of_one_file(stream: Watched) -> Iterator[Any]:
    while True:
        yield Image.open(stream)


def one_open_file(stream: Watched) -> Iterator[Any]:
    while True:
        yield stream


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
@pytest.mark.parametrize("together", [False, True], ids=["a call each", "one call"])
@pytest.mark.parametrize("sources", [one_lazy_image, images_of_one_file, one_open_file])
def test_shared_object_is_read_by_one_thread_at_a_time(
    sources: Callable[[Watched], Iterator[Any]], together: bool, kind: str
) -> None:
    data = file(IMAGE, kind)
    stream = Watched(data)
    rows = sources(stream)
    drafts = [processor().draft_prompt("<image>", [next(rows)]) for _ in range(6)]
    if together:
        media = MediaConfig(image_threads=4)
        many = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split=False, media=media)
        got = [pixels(prompt) for prompt in many.finish(drafts)]
    else:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(finished, drafts))
    # No two readers read at the same time
    assert not stream.met.is_set()
    (right,) = finished(processor().draft_prompt("<image>", [data]))
    for (one,) in got:
        np.testing.assert_array_equal(one, right)


def test_files_are_decoded_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)
    decode: Any = vars(media)["decode"]

    def waiting(*arguments: Any) -> Any:
        # This passes only if three decoders run at a time
        together.wait(5)
        return decode(*arguments)

    monkeypatch.setattr(media, "decode", waiting)
    many = Processor.load(
        EIGHT_B, ModelConfig.load(EIGHT_B), split=False, media=MediaConfig(image_threads=3)
    )
    images = [file(noise(9 + n, 9), "PNG") for n in range(3)]
    assert len(many.prompt("<image>" * 3, images).tiles) == 3


# Tests of objects that fail while they are read


class FailingList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise OSError("secret")


def failing_ids() -> Iterator[int]:
    yield 1
    raise OSError("secret")


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (
            lambda: processor().draft_prompt("a", FailingList()),
            "^images: reading it raised OSError$",
        ),
        (
            lambda: processor().draft_token_prompt(FailingList()),
            "^token_ids: reading it raised OSError$",
        ),
        (
            lambda: processor().draft_token_prompt(failing_ids()),  # type: ignore[arg-type]
            "^token_ids: reading it raised OSError$",
        ),
        (
            lambda: processor().draft_token_prompt(np.array(1)),  # type: ignore[arg-type]
            "^token_ids: reading it raised TypeError$",
        ),
        (
            lambda: processor().draft_chat(FailingList([{"role": "user", "content": "a"}])),
            "^messages: reading it raised OSError$",
        ),
    ],
)
def test_failing_lists_are_prompt_errors(draft: Callable[[], object], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        draft()
