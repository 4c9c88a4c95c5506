"""Bad rows of a job on the demo checkpoint cost the good ones nothing, and say nothing secret.

One job has all of them, and the good rows between them have the bytes that they have alone.
"""

import json
import re
import socket
import ssl
import threading
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from shutil import copy
from typing import Any, NamedTuple

import pytest

import bad_inputs
from bad_inputs import MAX_MODEL_LEN, MAX_PIXELS, Rows
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from idefics2_engine.jobs.writers.row_error import MOST_CHARACTERS, STAGES
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor

# A global address, which is asked for any picture of the host
PUBLIC = "93.184.216.34"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
TEXT = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nSECRET"

LEAK = re.compile(
    r"SECRET|U0VDUkVU|iVBOR|/9j/"
    r"|(?:^|[\s'\"(=])(?:~?/[\w.]|[A-Za-z]:\\)"
    r"|0x[0-9a-f]{6}|\?\w+=|://[^/\s]*@|base64,\w{8}|\\x89PNG|Traceback|File \"|\.py\b"
    r"|[\x00-\x1f\x7f]",
    re.IGNORECASE,
)


class Bad(NamedTuple):
    code: str
    columns: dict[str, Any]
    message: str = ""


class Job(NamedTuple):
    """The rows of the job, and what two runs made of them.

    Attributes:
        bad: Rows that must be errors.
        fine: Rows that must be answered.
        either: Rows that must be one of the two.
        alone: The output's rows of a run of the good rows.
        first: Those of a run of all rows, by id.
        second: The lines of another run of all rows.
    """

    bad: dict[str, Bad]
    fine: Rows
    either: Rows
    alone: list[bytes]
    first: dict[str, bytes]
    second: list[bytes]


class Unchecked:
    """Stands for TLS."""

    def wrap_socket(self, raw: socket.socket, server_hostname: str) -> socket.socket:
        return raw


def connect(_address: Any, _timeout: float) -> socket.socket:
    """Return a connection that has the answer to its request before it is made."""
    ours, theirs = socket.socketpair()
    request: list[bytes] = []

    def answer() -> None:
        while b"\r\n\r\n" not in b"".join(request) and (got := theirs.recv(4096)):
            request.append(got)
        theirs.sendall(REDIRECT if b" /inside" in b"".join(request) else TEXT)
        theirs.close()

    threading.Thread(target=answer, daemon=True).start()
    return ours


def resolve(host: str, port: int, **_more: Any) -> list[Any]:
    known = {bad_inputs.HOST: PUBLIC, "localhost": "127.0.0.1"}
    # Addresses are their own
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known.get(host, host), port))]


def texts_around_the_limit() -> Iterable[tuple[int, str]]:
    """Yield texts by the tokens that their prompts have more than the model takes."""
    processor = Processor.load(DEMO_MODEL, ModelConfig.load(DEMO_MODEL))

    def length(words: int) -> int:
        row = [{"role": "user", "content": "a" + " a" * words}]
        return len(processor.draft_chat(row).token_ids)

    # Each word is one token, and an answer needs room for one
    words = MAX_MODEL_LEN - 1 - length(0)
    for more in (-1, 0, 1):
        assert length(words + more) == MAX_MODEL_LEN - 1 + more
        yield more, "a" + " a" * (words + more)


def run(folder: Path, name: str, rows: Rows, root: Path, more: list[str]) -> list[bytes]:
    """Run a job of ``rows``, and return the lines of its output."""
    source = folder / "in.jsonl"
    lines = [json.dumps({"id": id} | columns) for id, columns in rows.items()]
    source.write_text("\n".join(lines), encoding="ascii")
    out = folder / f"{name}.jsonl"
    arguments = {
        "--input": source,
        "--output": out,
        "--media-root": root,
        "--allow-host": "*",
        "--max-image-pixels": MAX_PIXELS,
        "--max-model-len": MAX_MODEL_LEN,
        "--max-tokens": 2,
        "--temperature": 0.7,
        "--device": "cpu",
        "--retries": 0,
    }
    options = [str(one) for pair in arguments.items() for one in pair]
    assert main(["run", *options, *more]) in (0, 3)
    return out.read_bytes().splitlines()


_LOGPROBS = ["--save", "token_ids,logprobs", "--logprobs", "1", "--deterministic"]
# How many damaged pictures there are, and the options. Logprobs are the same row by row only, which
# takes long
SIZES = {
    "few": (35, 10, ["--save", "token_ids,image_info", "--no-split"]),
    "with-logprobs": (35, 10, [*_LOGPROBS, "--no-split"]),
    "all": (5, 500, ["--save", "token_ids", "--no-split"]),
}
_LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("with-logprobs", "all")]


@pytest.fixture(scope="module", params=["few", *_LONG])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    step, flips, options = SIZES[request.param]
    folder = tmp_path_factory.mktemp("bad")
    root = folder / "media root"
    root.mkdir()
    for path in DEMO_IMAGES.glob("*.png"):
        copy(path, root)
    good = bad_inputs.good_rows()
    bad = {
        name: Bad(code, {"images": images, "prompt": "What is this?"}, message)
        for name, code, images, message in bad_inputs.bad_pictures(root)
    }
    bad |= {name: Bad(code, columns) for name, code, columns in bad_inputs.bad_texts()}
    fine = bad_inputs.odd_texts() | bad_inputs.image_rows(bad_inputs.odd_pictures(), root)
    for more, text in texts_around_the_limit():
        if more > 0:
            bad["one token too many"] = Bad("prompt_too_long", {"prompt": text})
        else:
            fine[f"{more} tokens more than fit"] = {"prompt": text}
    doubtful = bad_inputs.cut_pictures(step) | bad_inputs.flipped_pictures(flips)
    either = bad_inputs.image_rows(doubtful, root)
    others = {name: row.columns for name, row in bad.items()} | fine | either
    assert len(good | others) == len(good) + len(bad) + len(fine) + len(either)
    # A good row follows each of the first bad ones
    mixed: Rows = {}
    for other, one in zip_longest(others.items(), good.items()):
        mixed |= dict(pair for pair in (other, one) if pair is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        patch.setattr(socket, "create_connection", connect)
        patch.setattr(ssl, "create_default_context", Unchecked)
        alone = run(folder, "alone", good, root, options)
        first = run(folder, "first", mixed, root, options)
        second = run(folder, "second", mixed, root, options)
    assert len(first) == len(mixed)
    by_id = dict(zip(mixed, first, strict=True))
    assert all(json.loads(line)["id"] == id for id, line in by_id.items())
    return Job(bad, fine, either, alone, by_id, second)


def without_place(line: bytes) -> bytes:
    return re.sub(rb',"row":\d+', b"", line, count=1)


def test_good_rows_have_the_same_bytes_among_bad_ones(job: Job) -> None:
    among = [line for id, line in job.first.items() if id.startswith("good")]
    assert list(map(without_place, among)) == list(map(without_place, job.alone))
    assert len(among) == 20
    assert all(json.loads(line)["error"] is None for line in among)


def test_bad_rows_have_their_codes(job: Job) -> None:
    found = {id: json.loads(job.first[id]) for id in job.bad}
    codes = {id: row["error"] and row["error"]["code"] for id, row in found.items()}
    assert codes == {id: row.code for id, row in job.bad.items()}
    for id, row in found.items():
        assert row["error"]["stage"] == STAGES[row["error"]["code"]]
        assert job.bad[id].message in row["error"]["message"]
        assert (row["outputs"], row["usage"]) == ([], None)


def test_odd_rows_are_answered(job: Job) -> None:
    found = {id: json.loads(job.first[id]) for id in job.fine}
    assert {id: row["error"] for id, row in found.items()} == dict.fromkeys(job.fine)
    for id, row in found.items():
        images = job.fine[id].get("images", [])
        # Typed control tokens make no images
        assert row["usage"]["images"] == len(images)
        assert (row["usage"]["image_tokens"] > 0) == bool(images)
        assert row["outputs"][0]["token_ids"]


def test_damaged_pictures_are_answered_or_an_error_about_the_image(job: Job) -> None:
    errors = [json.loads(job.first[id])["error"] for id in job.either]
    assert {error["code"] for error in errors if error} == {"image"}
    assert len(errors) // 8 < sum(error is None for error in errors) < len(errors)


def test_messages_say_nothing_secret(job: Job) -> None:
    messages = []
    for line in job.first.values():
        if error := json.loads(line)["error"]:
            messages.append(error["message"])
    assert len(messages) > len(job.bad)
    for message in messages:
        assert not LEAK.search(message), message
        assert 0 < len(message) <= MOST_CHARACTERS
    # The pattern finds what it is for
    assert all(map(LEAK.search, ("a /etc/x", "0x7f00aa11", "https://u:p@h/", "'/a.png'", "?k=1")))


def test_another_run_has_the_same_bytes(job: Job) -> None:
    assert job.second == list(job.first.values())


WRONG_COLUMNS: dict[str, tuple[str, list[Any]]] = {
    "numbers as prompts": ("prompt", [5, 6]),
    "bytes as prompts": ("prompt", [b"SECRET", b"\xff"]),
    "lists as prompts": ("prompt", [["SECRET"], []]),
    "numbers as images": ("image", [5, 6]),
    "lists of numbers as images": ("image", [[1], [2]]),
    "other structs as images": ("image", [{"pixels": b"SECRET"}, {"pixels": b""}]),
    "text as an image's bytes": ("image", [{"bytes": "SECRET"}, {"bytes": "U0VDUkVU"}]),
    "floats as ids": ("id", [0.5, 1.5]),
    "lists as ids": ("id", [["a"], ["b"]]),
}


@pytest.mark.parametrize("name", WRONG_COLUMNS)
def test_wrong_columns_of_a_table_are_errors_of_their_rows(name: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    column, values = WRONG_COLUMNS[name]
    columns = {"id": ["a", "b"], "prompt": ["x", "y"]} | {column: values}
    source, out = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), source)
    assert main(["run", "-i", str(source), "-o", str(out), "--device", "cpu"]) == 3
    errors = [json.loads(line)["error"] for line in out.read_text().splitlines()]
    assert len(errors) == 2
    for error in errors:
        assert error["code"] in ("schema", "prompt")
        assert not LEAK.search(error["message"])
        assert column in error["message"]
