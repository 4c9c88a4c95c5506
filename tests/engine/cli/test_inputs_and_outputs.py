"""Every kind of input gives the same answers in every kind of output, on the demo checkpoint."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.cli.jobs import run_job
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from job_inputs import write_rows

NAMES = ("crowd.png", "shapes.png", "sign.png")
LONG = "word " * 900
# By id
PROMPTS = {name: f"What is in {name}?" for name in NAMES} | {"too long": LONG}


def columns() -> list[dict[str, Any]]:
    return [
        {"id": id, "images": [id if id in NAMES else NAMES[0]], "prompt": prompt}
        for id, prompt in PROMPTS.items()
    ]


def plain(folder: Path) -> Path:
    return write_rows(folder / "q.jsonl", columns())


def packed(folder: Path) -> Path:
    path = folder / "q.jsonl.gz"
    path.write_bytes(gzip.compress(plain(folder).read_bytes()))
    return path


def zstd(folder: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    path = folder / "q.jsonl.zst"
    path.write_bytes(zstandard.compress(plain(folder).read_bytes()))
    return path


def openai(folder: Path) -> Path:
    def line(row: dict[str, Any]) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": row["images"][0]}}
        content = [image, {"type": "text", "text": row["prompt"]}]
        body = {"model": "m", "messages": [{"role": "user", "content": content}]}
        url = "/v1/chat/completions"
        return {"custom_id": row["id"], "method": "POST", "url": url, "body": body}

    return write_rows(folder / "q.jsonl", map(line, columns()))


def table(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    path = folder / "q.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "image", "prompt"))
        rows.writerows((row["id"], row["images"][0], row["prompt"]) for row in columns())
    return path


def parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    images = [{"bytes": (DEMO_IMAGES / row["images"][0]).read_bytes()} for row in columns()]
    made = pyarrow.table({"id": list(PROMPTS), "image": images, "prompt": list(PROMPTS.values())})
    path = folder / "q.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(made, path)
    return path


def shard(folder: Path) -> Path:
    path = folder / "q.tar"
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(columns()):
            text = json.dumps({"prompt": row["prompt"], "id": row["id"]}).encode()
            image = (DEMO_IMAGES / row["images"][0]).read_bytes()
            for suffix, content in {"png": image, "json": text}.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


class Answer(NamedTuple):
    id: str
    text: str | None
    finish_reason: str | None
    num_tokens: int | None
    error: tuple[str, str] | None


def answer(row: dict[str, Any]) -> Answer:
    if error := row["error"]:
        return Answer(row["id"], None, None, None, (error["code"], error["message"]))
    (first,) = row["outputs"]
    usage = row["usage"]
    return Answer(row["id"], first["text"], first["finish_reason"], usage["prompt_tokens"], None)


def lines(path: Path) -> list[Answer]:
    return [answer(json.loads(line)) for line in path.read_bytes().splitlines()]


def gzip_lines(path: Path) -> list[Answer]:
    return [answer(json.loads(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]


def zstd_lines(path: Path) -> list[Answer]:
    zstandard = pytest.importorskip("zstandard")
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        return [answer(json.loads(line)) for line in file]


def parquet_rows(path: Path) -> list[Answer]:
    rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    for row in rows:
        # Ids may be numbers elsewhere, so they are JSON there
        row["id"] = row["id"] if row["id"] in PROMPTS else json.loads(row["id"])
    return [answer(row) for row in rows]


def results(path: Path) -> list[Answer]:
    answers = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        body = row["response"]["body"]
        if row["response"]["status_code"] == 200:
            (choice,) = body["choices"]
            text, tokens = choice["message"]["content"], body["usage"]["prompt_tokens"]
            answers.append(Answer(row["custom_id"], text, choice["finish_reason"], tokens, None))
        else:
            error = body["error"]
            failed = error["code"], error["message"]
            answers.append(Answer(row["custom_id"], None, None, None, failed))
    return answers


OUTPUTS: dict[str, Callable[[Path], list[Answer]]] = {
    "auto out.jsonl": lines,
    "auto out.jsonl.gz": gzip_lines,
    "auto out.jsonl.zst": zstd_lines,
    "auto out.parquet": parquet_rows,
    "openai out.jsonl": results,
}


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    llm = LLM(
        DEMO_MODEL,
        device="cpu",
        max_model_len=512,
        split_images=False,
        allowed_media_root=DEMO_IMAGES,
    )
    with llm:
        yield llm


@pytest.fixture(scope="module")
def said(demo: LLM) -> list[str]:
    """Return what the model answers outside of jobs."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": str(DEMO_IMAGES / name)},
                    {"type": "text", "text": PROMPTS[name]},
                ],
            }
        ]
        for name in NAMES
    ]
    params = SamplingParams(temperature=0.0, max_tokens=3)
    return [one.outputs[0].text for one in demo.chat(conversations, params)]


@pytest.fixture
def one_engine(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command load no engine of its own."""

    class Choice:
        workers = 1

        def __init__(self, *_args: object) -> None:
            pass

        def __call__(self) -> AbstractContextManager[LLM]:
            return nullcontext(demo)

    monkeypatch.setattr(run_job, "EngineChoice", Choice)


@pytest.mark.usefixtures("one_engine")
@pytest.mark.parametrize("write", [plain, packed, zstd, openai, table, parquet, shard])
def test_answers_are_the_same(
    tmp_path: Path, write: Callable[[Path], Path], said: list[str]
) -> None:
    source = write(tmp_path)
    found = {}
    for name, read in OUTPUTS.items():
        kind, file = name.split()
        out = tmp_path / kind / file
        out.parent.mkdir(exist_ok=True)
        given = ["-i", str(source), "-o", str(out), "--media-root", str(DEMO_IMAGES)]
        given += ["--max-tokens", "3", "--output-format", kind]
        assert main(["run", *given]) == 3
        found[name] = read(out)
    first = found.pop("auto out.jsonl")
    assert found == dict.fromkeys(found, first)
    assert [one.id for one in first] == list(PROMPTS)
    assert [one.error and one.error[0] for one in first] == [None, None, None, "prompt_too_long"]
    assert [one.text for one in first[:3]] == said
    assert len(set(said)) == 3
