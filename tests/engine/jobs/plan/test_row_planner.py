"""Plans of rows: their counts and errors equal those of the engine."""

import base64
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.plan.row_planner import PlannedRow
from idefics2_engine.jobs.writers.row_error import row_error_of
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_engine.scheduling.sequence import Request
from paths import DEMO
from pictures import FORMATS, MODES, file, frames, noise, oriented, png_file
from planned_rows import job_rows, planner, question

SIZES = ((64, 64), (40, 90), (300, 20), (1, 1), (1, 500), (128, 128), (33, 57), (200, 150))


def good_prompts(folder: Path) -> Iterator[Any]:
    """Yield prompts with images of every mode, format, size and orientation."""
    for mode in MODES:
        for kind in ("PNG", "TIFF"):
            try:
                data = file(noise(70, 45, mode), kind)
            except (OSError, KeyError, ValueError):
                continue
            yield question(f"What is in {mode}?", data)
    for number, (width, height) in enumerate(SIZES):
        for kind in FORMATS:
            path = folder / f"{number}.{kind.lower()}"
            path.write_bytes(file(noise(width, height), kind))
            yield question("Where?", str(path))
    for turn in range(1, 9):
        yield question("How?", oriented(noise(90, 40), "JPEG", turn))
    uri = "data:image/png;base64," + base64.b64encode(file(noise(30, 60), "PNG")).decode()
    yield question("A", uri, frames("GIF"), {"bytes": file(noise(9, 5), "PNG"), "path": None})
    yield question("Two", str(folder / "0.png"), {"path": str(folder / "1.png"), "bytes": None})
    yield question("No image at all")
    yield {"prompt": "<image>Raw", "multi_modal_data": {"image": noise(20, 30)}}
    yield {"prompt_token_ids": [1, 5, 6, 7]}
    yield "raw text"


def bad_prompts(folder: Path) -> Iterator[Any]:
    """Yield prompts that fail before any pixel is decoded."""
    (folder / "text.png").write_text("no image")
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    for image in (
        str(folder / "none.png"),
        str(folder / "text.png"),
        str(folder / "pipe"),
        str(folder),
        "/dev/zero",
        "/etc/hostname",
        str(folder / ".." / "x.png"),
        b"",
        b"text",
        png_file(65535, 65535, b""),
        file(noise(400, 400), "PNG"),
        "https://example.org/a.png?key=secret",
        "data:image/png;base64,???",
        {"bytes": "text"},
        {},
        7,
        None,
    ):
        yield question("What?", image)
        yield question("Two?", file(noise(9, 5), "PNG"), image)
    yield question("word " * 9000)
    yield question("half of a pair \ud800")
    yield {"prompt": "<image>", "multi_modal_data": {"image": []}}
    yield {"prompt": "a", "images": []}
    yield {"prompt_token_ids": [10**9]}
    yield {"prompt_token_ids": []}
    yield [{"role": "robot", "content": "hello"}]
    yield {"role": "user", "content": "hello"}
    yield 7


def media(folder: Path, policy: ImagePolicy = ImagePolicy.PARITY) -> MediaConfig:
    return MediaConfig(image_policy=policy, allowed_media_root=folder, max_image_pixels=300 * 300)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def split(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def llm(folder: Path, split: bool) -> Iterator[LLM]:
    with LLM(
        DEMO,
        device="cpu",
        split_images=split,
        allowed_media_root=folder,
        max_image_pixels=300 * 300,
        kv_cache_tokens=8192,
    ) as loaded:
        yield loaded


def prepared(llm: LLM, row: JobRow) -> Request | RowError:
    """Prepare a row for the engine, with its images decoded."""
    builder = llm.request_builder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draft = builder.read_row(row.to_engine(), SamplingParams(), row.number)
            return builder.build_row(draft, None, builder.reader.job())
    except Idefics2Error as error:
        return row_error_of(error, builder.processor.media.allowed_media_root)


def check_equal(planned: PlannedRow, request: Request) -> None:
    assert planned.error is None
    assert planned.num_prompt == len(request.prompt_token_ids)
    assert planned.max_tokens == request.max_tokens
    assert [(tile.begin, tile.end, tile.num_patches) for tile in planned.tiles] == [
        (item.begin, item.end, item.tile.num_patches) for item in request.images
    ]


def test_good_rows_have_the_counts_of_the_engine(llm: LLM, folder: Path, split: bool) -> None:
    rows = job_rows(good_prompts(folder))
    planned = list(planner(DEMO, media(folder), split=split).plan_batch(rows))
    assert [(one.number, one.id, one.place) for one in planned] == [
        (row.number, row.id, row.place) for row in rows
    ]
    for one, row in zip(planned, rows, strict=True):
        request = prepared(llm, row)
        assert isinstance(request, Request), request
        check_equal(one, request)
        assert one.num_unread == 0
    assert {one.num_images for one in planned} == {0, 1, 2, 3}


def test_bad_rows_have_the_errors_of_the_engine(llm: LLM, folder: Path, split: bool) -> None:
    rows = job_rows(bad_prompts(folder))
    codes = set()
    planned = planner(DEMO, media(folder), split=split).plan_batch(rows)
    for one, row in zip(planned, rows, strict=True):
        assert one.error is not None, row.prompt
        assert one.error == prepared(llm, row)
        codes.add(one.error.code)
    assert codes == {"image", "media_not_allowed", "prompt", "prompt_too_long"}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=None),
        SamplingParams(max_tokens=7, n=3),
        SamplingParams(max_tokens=2000, min_tokens=2000),
        SamplingParams(stop_token_ids=[10**6]),
        SamplingParams(logprobs=-1, max_tokens=None),
        SamplingParams(bad_words=["a"], allowed_token_ids=[0, 1]),
    ],
)
def test_parameters_are_checked_as_by_the_engine(llm: LLM, params: SamplingParams) -> None:
    (row,) = job_rows([question("What?", file(noise(9, 5), "PNG"))], params)
    planned = planner(DEMO, MediaConfig(), split=llm.processor.image_config.split).plan(row)
    request = prepared(llm, row)
    if isinstance(request, Request):
        check_equal(planned, request)
        assert planned.num_answers == params.n
    else:
        assert planned.error == request


def test_context_counts_image_tokens_and_leaves_room_for_one_token(folder: Path) -> None:
    (row,) = job_rows([question("What?", file(noise(9, 5), "PNG"))])
    whole = planner(DEMO, MediaConfig(), split=False)
    length = whole.plan(row).num_prompt
    fits = planner(DEMO, MediaConfig(), split=False, max_model_len=length + 1).plan(row)
    assert (fits.error, fits.max_tokens) == (None, 1)
    unfit = planner(DEMO, MediaConfig(), split=False, max_model_len=length).plan(row)
    assert unfit.error is not None
    assert (unfit.error.code, unfit.longest) == ("prompt_too_long", length)


def test_error_of_the_reader_is_that_of_the_plan() -> None:
    error = RowError("json", "parse", "line 3: must be JSON")
    row = JobRow(0, 0, "a", "", "in.jsonl: line 3", None, error=error)
    assert planner(DEMO, MediaConfig()).plan(row).error == error


def test_images_that_are_not_read_count_as_the_largest() -> None:
    config = MediaConfig(allowed_media_hosts=("example.org",))
    (row,) = job_rows([question("What?", "https://example.org/a.png", "https://example.org/b.png")])
    (large,) = job_rows([question("What?", *[file(noise(1000, 1000), "PNG")] * 2)])
    for split in (False, True):
        for_largest = planner(DEMO, config, split=split)
        unread, read = for_largest.plan(row), for_largest.plan(large)
        assert (unread.num_unread, read.num_unread) == (2, 0)
        assert unread.num_patches == read.num_patches
        assert unread.num_prompt == read.num_prompt


def test_headers_are_read_as_far_as_asked(folder: Path) -> None:
    (folder / "broken.png").write_text("broken")
    broken, missing = job_rows(
        [question("?", str(folder / "broken.png")), question("?", str(folder / "nothing.png"))]
    )
    for check, found in (
        (ImageCheck.NONE, (None, None)),
        (ImageCheck.EXISTS, (None, "image")),
        (ImageCheck.HEADER, ("image", "image")),
    ):
        plans = [planner(DEMO, media(folder), check=check).plan(row) for row in (broken, missing)]
        codes = tuple(plan.error and plan.error.code for plan in plans)
        assert codes == found


def test_equal_prefixes_have_equal_page_names(folder: Path) -> None:
    image, copy, other = (file(noise(64, 64 + at), "PNG") for at in (0, 0, 1))
    texts = [
        question("word " * 150 + end, picture)
        for end, picture in (("a", image), ("b", copy), ("c", other))
    ]
    planned = [planner(DEMO, MediaConfig(), split=False).plan(row) for row in job_rows(texts)]
    names = [one.page_names for one in planned]
    assert len(names[0]) > 1
    assert names[0][:-1] == names[1][:-1]
    assert not set(names[0]) & set(names[2])
    # All positions of a prompt are computed if their log probabilities are wanted
    (scored,) = job_rows(texts[:1], SamplingParams(prompt_logprobs=1))
    assert planner(DEMO, MediaConfig(), split=False).plan(scored).page_names == []
    params = SamplingParams(prompt_logprobs=1, prompt_logprobs_start=2 * PAGE_SIZE + 1)
    (scored,) = job_rows(texts[:1], params)
    planned_end = planner(DEMO, MediaConfig(), split=False).plan(scored)
    assert planned_end.page_names == names[0][:2]


def test_rows_of_a_batch_are_planned_as_alone(folder: Path, split: bool) -> None:
    texts = ("Equal?", "Equal?", "<image>?", "a\ufdd0\ufdd1b", "  two  words\n", "", "é" * 300)
    image = file(noise(64, 64), "PNG")
    rows = job_rows(
        [question(text, *[image] * (number % 3)) for number, text in enumerate(texts)]
        + [question("half \ud800"), "raw <image>", {"prompt_token_ids": [1, 5]}]
    )
    together = planner(DEMO, media(folder), split=split).plan_batch(rows)
    assert [one.error is None for one in together] == [True] * 7 + [False, False, True]
    assert together == [planner(DEMO, media(folder), split=split).plan(row) for row in rows]
