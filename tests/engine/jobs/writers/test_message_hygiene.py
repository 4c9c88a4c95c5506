"""Messages of rows: real ones of images and prompts, and any text, have nothing that may not leave.

Whatever is marked as secret is put where a message could quote it.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.images.loader import media_config
from idefics2_engine.jobs.writers.row_error import MOST_CHARACTERS, clean_message, row_error_of
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.request_builder import RequestBuilder
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams
from pictures import file, noise

PNG = file(noise(40, 30), "PNG")
# Base64 of "SECRETSECRET" and of pixels begins like these
FORBIDDEN = re.compile(
    r"SECRET|U0VDUkVU|iVBOR|/9j/"
    r"|(?:^|[\s'\"(=])(?:~?/[\w.]|[A-Za-z]:\\)"
    r"|0x[0-9a-f]{6}|\?\w+=|://[^/\s]*@|base64,\w{8}|\\x89PNG|Traceback|[\x00-\x1f\x7f]",
    re.IGNORECASE,
)

SOURCES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda root: root / "missing SECRET-not.png",
    "missing text": lambda root: str(root / "sub dir/missing.png"),
    "outside": lambda root: root.parent / "SECRET/a.png",
    "dots": lambda root: f"{root}/../SECRET/a.png",
    "relative dots": lambda root: "../SECRET/a.png",
    "another root": lambda root: "/etc/SECRET/passwd",
    "link out": lambda root: root / "link.png",
    "folder": lambda root: root / "folder.png",
    "pipe": lambda root: root / "pipe",
    "device": lambda root: "/dev/zero",
    "null": lambda root: f"{root}/a\0b.png",
    "no image": lambda root: root / "text.txt",
    "cut": lambda root: root / "cut.png",
    "home": lambda root: "~/SECRET/a.png",
    "Windows": lambda root: r"C:\SECRET\a.png",
    "file URL": lambda root: f"file://{root}/missing.png",
    "file URL outside": lambda root: "file:///SECRET/a.png",
    "file URL of a host": lambda root: "file://user:SECRET@host/a.png",
    "file URL with a query": lambda root: "file:///a.png?key=SECRET",
    "URL": lambda root: "https://user:SECRET@example.org/SECRET/a.png?key=SECRET#SECRET",
    "URL with a long query": lambda root: "https://example.org/?" + "SECRET" * 99,
    "other scheme": lambda root: "s3://SECRET@bucket/a.png?sig=SECRET",
    "data": lambda root: "data:image/png;base64,U0VDUkVUU0VDUkVU",
    "data, bad": lambda root: "data:image/png;base64,U0VDUkVUU0VDUkVU*",
    "data, no base64": lambda root: "data:image/png,SECRET",
    "data, no comma": lambda root: "data:image/png;base64U0VDUkVUU0VDUkVU",
    "data in a name": lambda root: f"{root}/data:image/png;base64,U0VDUkVUU0VDUkVU",
    "bytes": lambda root: b"SECRET bytes",
    "cut bytes": lambda root: PNG[:60],
    "a dict": lambda root: {"bytes": PNG, "name": "SECRET"},
    "bytes of a dict": lambda root: {"bytes": "SECRET"},
    "number": lambda root: 5,
    "object": lambda root: object(),
    "long name": lambda root: "x" * 5000,
}


@cache
def processor() -> Processor:
    return Processor.load(DEMO_MODEL, ModelConfig.load(DEMO_MODEL))


def builder(root: Path) -> RequestBuilder:
    made = replace(processor(), media=media_config(allowed_media_root=root))
    config = ModelConfig.load(DEMO_MODEL)
    generation = GenerationConfig.load(DEMO_MODEL)
    return RequestBuilder(made, config, generation, 200, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "media root"
    (made / "folder.png").mkdir(parents=True)
    outside = tmp_path / "SECRET"
    outside.mkdir()
    (outside / "a.png").write_bytes(PNG)
    (made / "link.png").symlink_to(outside / "a.png")
    os.mkfifo(made / "pipe")
    (made / "text.txt").write_text("SECRET")
    (made / "cut.png").write_bytes(PNG[:-90])
    return made


def message_of(root: Path, row: Any, params: SamplingParams | None = None) -> str:
    """Return the message of a row's error, which is the same when the row comes again."""

    def build() -> None:
        made = builder(root)
        draft = made.read_row(row, params or SamplingParams())
        made.build_row(draft, None, made.reader.job())

    said = []
    for _ in range(2):
        with pytest.raises(Idefics2Error) as raised:
            build()
        said.append(row_error_of(raised.value, root))
    error = said[0]
    assert error == said[1]
    assert error.code != "internal"
    assert len(error.message) <= MOST_CHARACTERS
    return error.message


@pytest.mark.parametrize("name", SOURCES)
def test_messages_about_images(name: str, root: Path) -> None:
    part = {"type": "image", "image": SOURCES[name](root)}
    text = {"type": "text", "text": "What is this?"}
    for parts in ([part, text], [{"type": "image", "image": PNG}, part, text]):
        message = message_of(root, [{"role": "user", "content": parts}])
        assert not FORBIDDEN.search(message.replace("missing SECRET-not.png", "")), message
        # What is below the media root has its whole name there
        if name == "missing text":
            assert "sub dir/missing.png: cannot be read as an image: no such file" in message


PROMPTS: dict[str, Any] = {
    "no text": [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    "bytes in a part": [{"role": "user", "content": [{"type": "image", "bytes": PNG}]}],
    "a URL in a part": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "u", "key": "https://a/?k=SECRET"}}
            ],
        }
    ],
    "data in a part": [
        {
            "role": "user",
            "content": [{"type": "image", "data": f"data:image/png;base64,{'U0VDUkVU' * 9}"}],
        }
    ],
    "role": [{"role": "https://user:SECRET@host/", "content": "x"}],
    "keys": [{"role": "user", "content": "x", "/SECRET/path": 1}],
    "not a conversation": {"prompt": "x", "multi_modal_data": {"video": PNG}},
    "too few images": {"prompt": "<image>"},
    "surrogate": "a\ud800",
    "too long": "word " * 400,
    "object": {"prompt": object()},
    "token ids": {"prompt_token_ids": [10**9]},
    "image of a kind": {"prompt": "<image>", "multi_modal_data": {"image": [{"path": 5}]}},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_messages_about_prompts(name: str, root: Path) -> None:
    message = message_of(root, PROMPTS[name])
    assert not FORBIDDEN.search(message), message


def test_messages_about_sampling(root: Path) -> None:
    params = SamplingParams(bad_words=["https://a/?key=SECRET"], allowed_token_ids=[10**6])
    assert not FORBIDDEN.search(message_of(root, "x", params))


PIECES = st.sampled_from(
    [
        *("/home/ann/SECRET/", "C:\\SECRET\\", "https://u:SECRET@h.org/", "?key=SECRET", "s3://"),
        *("data:image/png;base64,U0VDUkVU", "0x7f0011223344", "b'\\x89PNG", "Bearer SECRET", "'"),
        *('"', " ", ": ", "\n", "\x1b[1m", "/", "://", "images[0]: ", "a.png", "é", "password="),
    ]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(PIECES, st.text(max_size=9)), max_size=30).map("".join))
def test_any_text_is_cleaned(text: str) -> None:
    got = clean_message(text, Path("/home/ann/media"))
    assert len(got) <= MOST_CHARACTERS
    assert got.isprintable()
    assert not re.search(r"0x[0-9a-f]{6}|[\s'\"]/home/ann|://[^/\s'\"<>]*@", got), got
