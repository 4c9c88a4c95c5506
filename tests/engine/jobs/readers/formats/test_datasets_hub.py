"""Datasets of the hub, by local stand-ins: there is no network."""

import datetime
import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.readers.formats.datasets_hub import HubSource
from idefics2_engine.jobs.readers.source import RawRow
from memory_storage import storage_in_memory

ALL = SimpleNamespace()
PICTURE = {"bytes": b"not decoded", "path": None}
ROWS = [
    {
        "image": PICTURE,
        "images": [PICTURE, {"bytes": b"", "path": "a.png"}],
        "text": f"é {number}",
        "label": number,
        "when": datetime.datetime(2026, 1, 1),
    }
    for number in range(3)
]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "images": [datasets.Image()],
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "when": datasets.Value("timestamp[s]"),
    }
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Replace the hub by a dataset that was saved to a folder; return the calls to it."""
    datasets.Dataset.from_list(ROWS, features=FEATURES).save_to_disk(tmp_path / "saved")
    made = []

    def load_dataset(name: str, **options: Any) -> Any:
        made.append({"name": name, **options})
        return datasets.load_from_disk(tmp_path / "saved").to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return made


def rows_of(
    monkeypatch: pytest.MonkeyPatch, values: list[dict[str, Any]], options: object = ALL
) -> list[RawRow]:
    """Return the rows of a dataset without decoded features."""
    made = datasets.IterableDataset.from_generator(lambda: iter(values))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: made)
    return list(HubSource("org/name:train", options))


def test_rows_are_not_decoded_and_always_the_same(calls: list[dict[str, Any]]) -> None:
    source = HubSource("hf:org/name:train", ALL)
    rows = list(source)
    assert rows == list(source)
    assert rows == [RawRow(f"hf:org/name:train: row {n}", row) for n, row in enumerate(ROWS)]
    assert source.form == "columns"
    assert source.files == ()
    assert calls == [
        {"name": "org/name", "revision": None, "split": "train", "streaming": True}
    ] * 2  # fmt: skip


def test_needed_columns_and_revision(calls: list[dict[str, Any]]) -> None:
    options = SimpleNamespace(columns_needed=("label", "image", "absent"))
    rows = list(HubSource("org/name@refs/convert/parquet:test_1", options))
    assert [row.columns for row in rows] == [{"image": PICTURE, "label": n} for n in range(3)]
    assert calls == [
        {
            "name": "org/name",
            "revision": "refs/convert/parquet",
            "split": "test_1",
            "streaming": True,
        }
    ]


def test_files_in_a_folder_by_the_library_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/train.jsonl").write_text('{"q": "a", "n": [1]}\n{"q": null, "n": []}\n')
    rows = list(HubSource("hf:org/name:train", ALL))
    assert [row.columns for row in rows] == [{"q": "a", "n": [1]}, {"q": None, "n": []}]
    with pytest.raises(JobError, match=r"^hf:org/name:test: cannot be read: ValueError$"):
        list(HubSource("hf:org/name:test", ALL))


@pytest.mark.parametrize(
    "name",
    [
        *("", "hf:", "hf:org/name", "hf:name:train", "hf:org/name:", "hf:a/b/c:train"),
        *("hf:../name:train", "hf:org/..:train", "hf:/name:train", "hf:org/name:train:x"),
        *("hf:hf:org/name:train", "hf:org/name@:train", "hf:org/name:train[:10]", "s3://a/b:c"),
    ],
)
def test_other_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"must be hf:org/name:split$"):
        HubSource(name, ALL)


def test_an_error_of_the_hub_ends_the_job_without_its_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows() -> Any:
        yield {"a": 1}
        raise ConnectionError("https://user:token@host/?secret")

    made = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: made)
    read: list[RawRow] = []
    with pytest.raises(JobError) as error:
        read.extend(HubSource("hf:org/name:train", ALL))
    assert [row.columns for row in read] == [{"a": 1}]
    assert str(error.value) == "hf:org/name:train: cannot be read at row 1: ConnectionError"

    def load_dataset(*_args: Any, **_options: Any) -> Any:
        raise ConnectionError("https://user:token@host/?secret")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(JobError, match=r"^hf:org/name:train: cannot be read: ConnectionError$"):
        list(HubSource("hf:org/name:train", ALL))


class TestFilesOfTheDataset:
    def rows(self, monkeypatch: pytest.MonkeyPatch, *paths: Any) -> list[RawRow]:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("in/a.png", b"zipped")
        files = {
            "datasets/org/name@abc/a.png": b"png",
            "datasets/org/name@abc/a.zip": archive.getvalue(),
            "datasets/org/name@abc/large.png": bytes(1001),
            "datasets/org/names/a.png": b"another",
        }
        with storage_in_memory("hf") as storage:
            for path, content in files.items():
                storage.pipe(path, content)
            values = [{"image": {"bytes": None, "path": path}} for path in paths]
            return rows_of(monkeypatch, values, SimpleNamespace(max_media_bytes=1000))

    def test_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        place = "hf://datasets/org/name@abc"
        rows = self.rows(monkeypatch, f"{place}/a.png", f"zip://in/a.png::{place}/a.zip")
        assert [row.columns for row in rows] == [
            {"image": {"bytes": b"png", "path": None}},
            {"image": {"bytes": b"zipped", "path": None}},
        ]

    @pytest.mark.parametrize(
        "path",
        [
            *("a.png", "/etc/passwd", "https://host/a.png", "hf://datasets/org/names/a.png"),
            *("hf://datasets/org/name@abc/../../names/a.png", "file::hf://datasets/org/name/a.png"),
            *("hf://datasets/org/name/a.zip::/etc/passwd", "hf://org/name/a.png", None),
        ],
    )
    def test_others_are_left_to_the_engine(
        self, monkeypatch: pytest.MonkeyPatch, path: str | None
    ) -> None:
        (row,) = self.rows(monkeypatch, path)
        assert row.columns == {"image": {"bytes": None, "path": path}}

    def test_errors_cost_their_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        place = "hf://datasets/org/name@abc"
        names = ("missing.png", "large.png", "a.png")
        rows = self.rows(monkeypatch, *(f"{place}/{name}" for name in names))
        assert [row.error for row in rows] == [
            RowError(
                "media_fetch",
                "media",
                "column 'image': a file of the dataset cannot be read: FileNotFoundError",
            ),
            RowError(
                "image",
                "media",
                "column 'image': a file of the dataset must have at most 1000 bytes, got more",
            ),
            None,
        ]
        assert rows[-1].columns == {"image": {"bytes": b"png", "path": None}}
