"""Options of reading: every one is checked, and combinations of them."""

from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.images.loader import MAX_BYTES
from idefics2_engine.jobs.readers.input_options import MAX_MEDIA_BYTES, InputOptions
from idefics2_engine.jobs.readers.shard import Shard
from job_inputs import input_options


def test_defaults() -> None:
    assert MAX_MEDIA_BYTES == MAX_BYTES
    options = input_options("q.jsonl")
    assert options.inputs == ("q.jsonl",)
    assert (options.shard, options.keep, options.sample_seed) == (Shard(0, 1), (), 0)
    assert input_options("a", "b", shard="1/2", keep=["x"]).shard == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ()}, "inputs must be a list of one or more names"),
        ({"inputs": ("",)}, "inputs must be a list of one or more names, each a name, got ''"),
        ({"input_format": "json"}, "input_format must be one of 'auto', 'jsonl', 'openai'"),
        ({"limit": 0}, "limit must be an integer from 1"),
        ({"sample": 1.5}, "sample must be an integer from 1"),
        ({"sample_seed": 2**63}, "sample_seed must be an integer from"),
        ({"shard": "2/2"}, "shard must be i/n with 0 <= i < n, or auto, got '2/2'"),
        ({"shard": "-1/2"}, "shard must be"),
        ({"shard": "1"}, "shard must be"),
        ({"shard": 1}, "shard must be"),
        ({"on_duplicate_id": "drop"}, "on_duplicate_id must be 'error' or 'suffix', got 'drop'"),
        ({"keep": "title"}, "keep must be a list of names of columns"),
        ({"keep": ["a", "a"]}, "keep must name each column once"),
        ({"id_column": ""}, "id_column must be a name"),
        ({"prompt": 7}, "prompt must be a string"),
        ({"prompt": "a", "prompt_template": "b"}, "prompt must come without prompt_template"),
        ({"prompt": "a", "prompt_column": "b"}, "prompt_column must come without a prompt of the job"),
        ({"prompt_template": "a", "messages_column": "b"}, "messages_column must come without a prompt"),
        ({"prompt_column": "a", "messages_column": "b"}, "prompt_column must come without messages_column"),
        ({"media_root": "/no/such"}, "media_root must be a folder, got '/no/such'"),
        ({"hash_media": 1}, "hash_media must be True or False"),
        ({"check_model": ""}, "check_model must be a name"),
        ({"max_line_bytes": 0}, "max_line_bytes must be an integer from 1"),
    ],
)  # fmt: skip
def test_bad_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InputOptions(**{"inputs": "q.jsonl", **options})
    assert str(caught.value).startswith(message)


def test_shard_of_an_array_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_task(task: str, count: str, first: str = "") -> None:
        names = ("TASK_ID", "TASK_COUNT", "TASK_MIN")
        for name, value in zip(names, (task, count, first), strict=True):
            monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)

    set_task("3", "8")
    assert input_options("q", shard="auto").shard == (3, 8)
    # Arrays may begin at 1
    set_task("8", "8", "1")
    assert input_options("q", shard="auto").shard == (7, 8)
    set_task("16", "4", "0")
    with pytest.raises(ConfigError, match="shard: auto must have task numbers without gaps"):
        input_options("q", shard="auto")
    set_task("", "")
    with pytest.raises(ConfigError, match="shard: auto must be in an array job of Slurm"):
        input_options("q", shard="auto")


def test_columns_that_may_have_a_use(tmp_path: Path) -> None:
    assert input_options("q").columns_needed == (
        "id", "image", "images", "messages", "prompt", "sampling",
    )  # fmt: skip
    file = tmp_path / "prompt.txt"
    file.write_text("{title} of {year}")
    options = input_options(
        "q", prompt_template=file, keep=["x"], image_column="photo", id_column="key"
    )
    assert options.columns_needed == ("key", "photo", "sampling", "title", "x", "year")
    file.write_bytes(b"\xef\xbb\xbfWhat is\r\n{title}?\r\n")
    template = options.read_template()
    assert template is not None
    assert template.text == "What is\n{title}?"
    with pytest.raises(ConfigError, match=r"no\.txt: cannot be read"):
        input_options("q", prompt_template=tmp_path / "no.txt").read_template()
