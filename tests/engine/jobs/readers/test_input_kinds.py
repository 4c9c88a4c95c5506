"""Every kind of input gives the engine the same rows."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.images.loader import MediaConfig, load_image
from job_inputs import comparable, images_of, job_input, read_rows, text_of, write_rows
from pictures import file, noise

NAMES = ("stars", "moons & suns", "ünïcode")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES, 3):
        (tmp_path / f"{name}.png").write_bytes(file(noise(number, 2), "PNG"))
    return tmp_path


def plain(folder: Path) -> Path:
    rows = [{"id": name, "images": [f"{name}.png"], "prompt": f"{name}?"} for name in NAMES]
    return write_rows(folder / "q.jsonl", rows)


def packed(folder: Path) -> Path:
    path = folder / "q.jsonl.gz"
    path.write_bytes(gzip.compress(plain(folder).read_bytes()))
    return path


def openai(folder: Path) -> Path:
    def line(name: str) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": f"{name}.png"}}
        content = [image, {"type": "text", "text": f"{name}?"}]
        body = {"model": "m", "messages": [{"role": "user", "content": content}]}
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}

    return write_rows(folder / "batch.jsonl", map(line, NAMES))


def table(folder: Path) -> Path:
    path = folder / "q.csv"
    with open(path, "w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(("id", "image", "prompt"))
        rows.writerows((name, f"{name}.png", f"{name}?") for name in NAMES)
    return path


def parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    images = [{"bytes": (folder / f"{name}.png").read_bytes(), "path": "gone"} for name in NAMES]
    columns = {"id": NAMES, "image": images, "prompt": [f"{name}?" for name in NAMES]}
    written = pyarrow.table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(written, folder / "q.parquet")
    return folder / "q.parquet"


def shard(folder: Path) -> Path:
    path = folder / "q.tar"
    with tarfile.open(path, "w") as archive:
        for name in NAMES:
            columns = json.dumps({"prompt": f"{name}?", "id": name}).encode()
            data = {"png": (folder / f"{name}.png").read_bytes(), "json": columns}
            for suffix, content in data.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("write", [plain, packed, openai, table, parquet, shard])
def test_rows_are_the_same(folder: Path, write: Callable[[Path], Path]) -> None:
    rows = read_rows(write(folder))
    assert [row.error for row in rows] == [None] * len(NAMES)
    assert [(row.id, text_of(row)) for row in rows] == [(name, f"{name}?") for name in NAMES]
    media = MediaConfig(allowed_media_root=folder)
    sizes = [[load_image(source, media).size for source in images_of(row)] for row in rows]
    assert sizes == [[(number, 2)] for number in range(3, 3 + len(NAMES))]


@pytest.mark.parametrize("write", [plain, packed, openai, table, parquet, shard])
def test_rows_from_a_place_on(folder: Path, write: Callable[[Path], Path]) -> None:
    whole = job_input(write(folder))
    rows = [comparable(row) for row in whole.rows()]
    for begin in range(len(rows) + 2):
        assert [comparable(row) for row in whole.rows(begin=begin)] == rows[begin:]
    # A shard is read member by member
    assert whole.can_skip == (write is not shard)


def test_a_folder_of_images_has_rows_for_a_prompt(folder: Path) -> None:
    rows = read_rows(folder, prompt="What is this?")
    assert [row.id for row in rows] == sorted(f"{name}.png" for name in NAMES)
    assert {text_of(row) for row in rows} == {"What is this?"}
    images = job_input(folder, prompt="What is this?")
    assert images.can_skip
    assert [row.id for row in images.rows(begin=1)] == [row.id for row in rows[1:]]
    media = MediaConfig(allowed_media_root=folder)
    assert all(load_image(images_of(row)[0], media).size[1] == 2 for row in rows)
