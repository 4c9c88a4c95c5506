"""Checks of images before a job: which rows get an error, and that it is the run's own."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.images.sources.source_check import SourceCheck
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.plan.image_check import ImageCheck, image_error, images_of
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.validation import validate
from idefics2_engine.sampling_params import SamplingParams
from paths import DEMO
from pictures import file, noise
from planned_rows import job_rows, planner, question


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "good.png").write_bytes(file(noise(9, 5), "PNG"))
    (folder / "text.png").write_text("no image")
    (folder / "large.png").write_bytes(file(noise(200, 100), "PNG"))
    (tmp_path / "outside.png").write_bytes(file(noise(9, 5), "PNG"))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(folder / "pipe.png")
    return folder


NAMES = ("good.png", "none.png", "link.png", "pipe.png", "../outside.png", "text.png", "large.png")


@pytest.mark.parametrize(
    ("check", "refused"), [("none", 0), ("exists", 4), ("header", len(NAMES) - 1)]
)
def test_rows_get_the_error_of_the_run(check: str, refused: int, root: Path) -> None:
    media = MediaConfig(allowed_media_root=root, max_image_pixels=10_000)
    good = str(root / "good.png")
    rows = job_rows(
        [question("?", str(root / name)) for name in NAMES]
        + [question("?", good, str(root / name)) for name in NAMES]
        + [{"prompt": "<image>", "multi_modal_data": {"image": str(root / name)}} for name in NAMES]
    )
    errors = [image_error(row, ImageCheck(check), media) for row in rows]
    faster = SourceCheck(media)
    assert errors == [image_error(row, ImageCheck(check), media, faster) for row in rows]
    bad = {NAMES[row.number % len(NAMES)] for row, error in zip(rows, errors, strict=True) if error}
    assert bad == {*NAMES[1 : 1 + refused]}
    run = planner(DEMO, media)
    for row, error in zip(rows, errors, strict=True):
        assert error is None or error == run.plan(row).error


def test_other_rows_pass() -> None:
    broken = JobRow(0, 0, "a", "", "line 1", None, error=RowError("json", "parse", "torn"))
    rows = [
        broken,
        *job_rows(["text", [{"role": "robot"}], {"prompt": "a"}, {"prompt_token_ids": [1]}]),
    ]
    assert not any(image_error(row, ImageCheck.HEADER, MediaConfig()) for row in rows)


def test_validation_counts_bad_images(root: Path) -> None:
    lines = [json.dumps({"images": [name], "prompt": "What?"}) for name in NAMES]
    path = root / "in.jsonl"
    path.write_text("\n".join([*lines, "{"]))
    options, media = InputOptions(inputs=(str(path),)), MediaConfig(allowed_media_root=root)
    for check, bad in (("none", 0), ("exists", 4), ("header", 5)):
        find_error = partial(image_error, check=ImageCheck(check), media=media)
        found = validate(JobInput(options, SamplingParams()), find_error)
        assert (found.num_rows, found.num_bad) == (len(NAMES) + 1, bad + 1)
        assert found.counts.get("image", 0) + found.counts.get("media_not_allowed", 0) == bad
        assert found.num_repeated == 0


def test_images_are_found_in_every_form_of_a_prompt() -> None:
    one, two = file(noise(3, 4), "PNG"), {"path": "a.png"}
    rows = job_rows(
        [
            question("a", one, two),
            {"prompt": "a", "multi_modal_data": {"image": one}},
            {"prompt": "a", "multi_modal_data": {"image": [one, two]}},
            {"prompt": "a", "multi_modal_data": None},
            "text",
        ]
    )
    assert [images_of(row) for row in rows] == [[one, two], [one], [one, two], [], []]
