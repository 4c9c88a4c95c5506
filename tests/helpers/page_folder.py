"""The folder and the names in which the examples of the pages run.

The demo checkpoint is where the pages have one of the reader's own, and pictures and rows have the
names that the pages use.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from idefics2_engine import LLM, Row, SamplingParams
from page_blocks import files_of
from paths import DEMO, ROOT

_PICTURES = {
    "a.png": "shapes.png",
    "b.jpg": "after.png",
    "shapes.png": "shapes.png",
    "room.jpg": "before.png",
    "photos/one.png": "before.png",
    "photos/two.png": "after.png",
}
_MODELS = (
    "path/to/idefics2-8b",
    "HuggingFaceM4/idefics2-8b",
    "HuggingFaceM4/idefics2-8b@main",
    "HuggingFaceM4/idefics2-8b-base",
)
# Without docs/, into which a command of a page writes
_LINKS = ("bench", "engine", "examples", "kernels", "tests")
_RESULTS = {"before.json": "h200-latency-d1d3656.json", "after.json": "h200-latency.json"}


def make_folder(folder: Path, page: Path) -> None:
    """Fill a new folder with what the examples of ``page`` need."""
    for name in _LINKS:
        (folder / name).symlink_to(ROOT / name)
    for name in _MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(DEMO)
    for name, source in _PICTURES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "examples/images" / source, folder / name)
    (folder / "data/images").mkdir(parents=True)
    for name, source in _RESULTS.items():
        shutil.copyfile(ROOT / "bench/results" / source, folder / name)
    rows = [
        {"id": name, "images": ["a.png"], "prompt": f"What color is the {name}?"}
        for name in ("star", "square")
    ]
    files = {"questions.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows), **files_of(page)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def page_names() -> dict[str, Any]:
    """Return the names, besides ``llm``, that Python blocks may use without defining them."""
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Where is the star?"},
    ]
    messages = [{"role": "user", "content": content}]
    params = SamplingParams(temperature=0.0, max_tokens=4)
    return {
        "__name__": "page",
        "LLM": LLM,
        "SamplingParams": SamplingParams,
        "model": DEMO,
        "messages": messages,
        "params": params,
        "prompts": [messages, messages],
        "rows": [Row("one", messages, params)],
    }
