"""Plain rows and tables: prompts, conversations, images, and what their columns may be."""

from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.rows.columns_form import ColumnsForm
from idefics2_engine.jobs.readers.rows.row_builder import IdentifiedRow, RowBuilder
from idefics2_engine.jobs.readers.rows.row_images import RowImages
from job_inputs import (
    DEFAULTS,
    TableSource,
    error_of,
    images_of,
    input_options,
    read_rows,
    text_of,
    write_rows,
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "a.png"},
            {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}},
            {"type": "text", "text": "Which is larger?"},
        ],
    },
]


def one(path: Path, row: object, **options: Any) -> JobRow:
    (found,) = read_rows(write_rows(path / "q.jsonl", [row]), **options)
    return found


def table_rows(root: Path, rows: list[dict[str, Any]], **given: Any) -> list[JobRow]:
    """Return rows as from a table."""
    options = input_options("table", **given)
    form = ColumnsForm(options, options.read_template(), RowImages(root), is_table=True)
    builder = RowBuilder({"columns": form}, DEFAULTS, options.keep)
    return [
        builder.build(
            IdentifiedRow(number, number, builder.row_id(raw, "columns", 0), "columns", raw)
        )
        for number, raw in enumerate(TableSource(rows))
    ]


def test_a_prompt_and_its_images_are_a_conversation(tmp_path: Path) -> None:
    row = one(tmp_path, {"id": "a1", "images": ["a.png", "sub/b.png"], "prompt": "What is this?"})
    assert row.prompt == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": f"{tmp_path}/a.png"},
                {"type": "image", "image": f"{tmp_path}/sub/b.png"},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]
    assert (row.id, row.index, row.number, row.error, dict(row.keep)) == ("a1", 0, 0, None, {})
    assert row.sampling_params is DEFAULTS
    assert row.to_engine().key == "a1"


def test_messages_are_taken_with_images_below_the_root(tmp_path: Path) -> None:
    row = one(tmp_path, {"id": 7, "messages": MESSAGES})
    assert images_of(row) == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert row.prompt is not None
    assert [message["role"] for message in row.prompt] == ["system", "user"]  # type: ignore[index]


def test_bare_image_parts_are_the_images_of_the_row(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "image", "image": "b"}]
    messages = [{"role": "user", "content": content}]
    row = one(tmp_path, {"images": "a", "messages": messages})
    assert images_of(row) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    message = error_of(one(tmp_path, {"images": ["a", "c"], "messages": messages})).message
    assert "must have as many image parts without a source as there are images" in message


def test_names_of_columns_can_be_chosen(tmp_path: Path) -> None:
    row = {"key": 3, "photo": "a.png", "question": "Why?"}
    options = {"id_column": "key", "image_column": "photo", "prompt_column": "question"}
    found = one(tmp_path, row, **options)
    assert (found.id, text_of(found), images_of(found)) == (3, "Why?", [f"{tmp_path}/a.png"])
    found = one(tmp_path, {"talk": MESSAGES}, messages_column="talk")
    assert len(images_of(found)) == 2
    for name in ("key", "photo", "question"):
        error = error_of(one(tmp_path, _without(row, name), **options))
        assert error[:2] == ("schema", "parse")
        assert error.message == f"the row must have '{name}', got no such column"


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        ({"id": 1}, "schema", "the row must have 'prompt' or 'messages', got neither"),
        ({"prompt": None}, "schema", "the row must have 'prompt' or 'messages', got neither"),
        ({"prompt": "a", "messages": MESSAGES}, "schema", "must have 'prompt' or 'messages', got both"),
        ({"prompt": 7}, "prompt", "prompt: must be a string, got int"),
        ({"prompt": "\ud83d"}, "prompt", "prompt: must be Unicode characters, got half of"),
        ({"messages": []}, "prompt", "messages: must be a list of at least one message, got []"),
        ({"messages": "hi"}, "prompt", "messages: must be a list of at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "prompt", "messages[0]: role must be"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "prompt", "content[0]: must"),
        ({"prompt": "a", "image": "x"}, "unknown_key", "keys with a use, got 'image'"),
        ({"prompt": "a", "sampling_params": {}}, "unknown_key", "got 'sampling_params'"),
        ({"prompt": "a", "images": 7}, "schema", "images[0] must be a path, an address, or bytes"),
        ({"prompt": "a", "images": ["a", None]}, "schema", "images[1] must be a path"),
        ({"prompt": "a", "images": [[]]}, "schema", "images[0] must be a path"),
        ({"prompt": "a", "images": ""}, "schema", "images[0] must be a path"),
        ({"prompt": "a", "images": {}}, "schema", "images[0] must have 'bytes' or 'path'"),
        ({"prompt": "a", "images": {"bytes": "x"}}, "schema", "images[0]: 'bytes' must be bytes"),
        ({"prompt": "a", "images": {"url": "x"}}, "schema", "must have 'bytes' or 'path'"),
        ({"prompt": "a", "id": True}, "schema", "the id must be a string or a 64-bit integer, got True"),
        ({"prompt": "a", "id": 1.0}, "schema", "got 1.0"),
        ({"prompt": "a", "id": 2**63}, "schema", "got 9223372036854775808"),
        ({"prompt": "a", "id": ["x"]}, "schema", "got a list"),
    ],
)  # fmt: skip
def test_rows_of_another_shape_are_errors(
    tmp_path: Path, row: dict[str, Any], code: str, message: str
) -> None:
    found = one(tmp_path, row)
    error = error_of(found)
    assert (error.code, error.stage) == (code, "prepare" if code == "prompt" else "parse")
    assert message in error.message
    assert found.id == (1 if row == {"id": 1} else "row-0")


LEAKS = ["/home/ann/key.png", "https://ann:pw@h.org/a?key=qwertz", "data:image/png;base64,QUJD"]


@pytest.mark.parametrize("secret", LEAKS)
def test_messages_do_not_quote_what_must_not_leave(tmp_path: Path, secret: str) -> None:
    part = {"type": "image_url", "image_url": secret, "x": 1}
    rows = [
        {"prompt": {"a": secret}},
        {"prompt": "a", "images": {"url": secret}},
        {"prompt": "a", "sampling": {"stop": [secret, 1]}},
        {"prompt": "a", "sampling": {secret: 1}},
        {"prompt": "a", secret: 1},
        {"messages": [{"role": secret, "content": "a"}]},
        {"messages": [{"role": "user", "content": [part]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": {"x": secret}}]}]},
        {"messages": secret},
        {"id": [secret], "prompt": "a"},
    ]
    found = read_rows(write_rows(tmp_path / "q.jsonl", rows))
    assert len(found) == len(rows)
    for row in found:
        message = error_of(row).message
        for leak in ("ann", "pw", "qwertz", "QUJD", str(tmp_path)):
            assert leak not in message, message


def test_null_keys_count_as_missing(tmp_path: Path) -> None:
    row = {"id": None, "images": None, "prompt": "a", "messages": None, "sampling": None, "x": None}
    found = one(tmp_path, row)
    assert (found.error, found.id, text_of(found), images_of(found)) == (None, "row-0", "a", [])


def test_columns_that_are_kept_or_in_the_prompt_are_known(tmp_path: Path) -> None:
    row = {"prompt": "a", "title": "t", "year": 1999, "nested": {"b": [1, None, 2.5]}}
    found = one(tmp_path, row, keep=["nested", "year", "title", "absent"])
    wanted = {"nested": {"b": [1, None, 2.5]}, "year": 1999, "title": "t", "absent": None}
    assert dict(found.keep) == wanted
    # The order is that of the option
    assert list(found.keep) == list(wanted)
    found = one(tmp_path, row, prompt="{title} {prompt}", keep=["year", "nested"])
    assert text_of(found) == "t a"
    error = error_of(one(tmp_path, row, prompt="{title}", keep=["year", "nested"]))
    assert (error.code, "got 'prompt'" in error.message) == ("unknown_key", True)


def test_error_rows_keep_their_columns_and_their_id(tmp_path: Path) -> None:
    found = one(tmp_path, {"id": "a", "prompt": 7, "title": "t"}, keep=["title"])
    assert error_of(found).code == "prompt"
    assert (found.id, dict(found.keep)) == ("a", {"title": "t"})


def test_tables_ignore_columns_without_a_use(tmp_path: Path) -> None:
    (row,) = table_rows(tmp_path, [{"id": 1, "prompt": "a", "image": "x.png", "score": 2}])
    assert images_of(row) == [f"{tmp_path}/x.png"]
    (row,) = table_rows(tmp_path, [{"prompt": "a", "images": [b"x", {"path": "y", "bytes": None}]}])
    assert images_of(row) == [b"x", f"{tmp_path}/y"]
    (row,) = table_rows(tmp_path, [{"prompt": "a", "images": []}])
    assert images_of(row) == []


def test_bytes_have_precedence_over_their_path(tmp_path: Path) -> None:
    for data in (b"x", bytearray(b"x"), memoryview(b"x")):
        (row,) = table_rows(tmp_path, [{"prompt": "a", "image": {"bytes": data, "path": "y"}}])
        assert images_of(row) == [b"x"]


def test_nulls_of_tables(tmp_path: Path) -> None:
    rows = table_rows(
        tmp_path,
        [
            {"id": None, "prompt": "a", "image": b"x", "sampling": None},
            {"id": 1, "prompt": None, "image": b"x"},
            {"id": 2, "prompt": "a", "image": None},
            {"id": 3, "prompt": "a", "image": [b"x", None]},
            {"id": 4, "prompt": "a", "image": b"x", "sampling": {"seed": 3, "max_tokens": None}},
        ],
    )
    assert [None if row.error is None else row.error.code for row in rows] == [
        None, "schema", "schema", "schema", None,
    ]  # fmt: skip
    assert error_of(rows[2]).message == "'image' must be an image, got null"
    assert rows[4].sampling_params is not None
    # Null is a column of another row, and not the number of tokens
    assert (rows[4].sampling_params.seed, rows[4].sampling_params.max_tokens) == (3, 7)


def test_objects_of_tables_may_be_text(tmp_path: Path) -> None:
    talk = '[{"role": "user", "content": "Why?"}]'
    good, deep, bad = table_rows(
        tmp_path,
        [
            {"messages": talk, "sampling": '{"max_tokens": 3}'},
            {"messages": "[" * 1000},
            {"messages": talk, "sampling": '{"seed": 1, "seed": 2}'},
        ],
    )
    assert (text_of(good), good.sampling_params and good.sampling_params.max_tokens) == ("Why?", 3)
    assert error_of(deep)[:2] == ("json", "parse")
    assert error_of(bad)[:2] == ("duplicate_key", "parse")


@pytest.mark.parametrize("value", [b"x", float("nan"), {1: 2}, object(), [float("inf")]])
def test_columns_that_are_no_json_are_not_kept(tmp_path: Path, value: object) -> None:
    (row,) = table_rows(tmp_path, [{"id": 5, "prompt": "a", "x": value}], keep=["x"])
    error = error_of(row)
    assert (error.code, row.id, dict(row.keep)) == ("schema", 5, {})
    assert error.message.startswith("column 'x' must be JSON data to be kept, got ")
