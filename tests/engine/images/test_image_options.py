"""The rules for images as options of the command line and as arguments of ``LLM``."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image

import idefics2_engine
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.cli.main import main
from idefics2_engine.errors import ConfigError, ImageError, MediaNotAllowedError
from idefics2_engine.images.policy import ImagePolicy
from pictures import file, frames, noise

URL = "https://pictures.example/a.png"


class Answerer:
    """A fake ``LLM`` that records its arguments and its images."""

    built: dict[str, Any]
    shown: list[Image.Image]
    model = SimpleNamespace(device="cpu", dtype="torch.float32")
    config = SimpleNamespace(is_quantized=False)

    def __init__(self, model: Any = None, **settings: Any) -> None:
        Answerer.built = settings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def stream(self, prompt: Any, params: SamplingParams) -> Any:
        Answerer.shown = [part["image"] for part in prompt[0]["content"] if "image" in part]
        answer = SimpleNamespace(text="Yes.", token_ids=[1], finish_reason="stop", stop_reason=None)
        yield SimpleNamespace(outputs=[answer], prompt_token_ids=[1], finished=True)


@pytest.fixture
def answerer(monkeypatch: pytest.MonkeyPatch) -> type[Answerer]:
    monkeypatch.setitem(vars(idefics2_engine), "LLM", Answerer)
    return Answerer


def ask(*argv: str) -> int:
    return main(["generate", "--prompt", "x", *argv])


@pytest.fixture
def clear(tmp_path: Path) -> str:
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    return str(tmp_path / "clear.png")


def test_options_apply_to_images_and_model(answerer: type[Answerer], clear: str) -> None:
    assert ask("--image", clear) == 0
    assert answerer.shown[0].getpixel((0, 0)) == (0, 0, 0)
    assert not answerer.built.keys() & {"image_policy", "max_image_pixels", "allowed_media_hosts"}
    options = "--image-policy correct --max-image-pixels 48 --allow-host a.example --allow-host .b"
    assert ask("--image", clear, *options.split()) == 0
    assert answerer.shown[0].getpixel((0, 0)) == (255, 255, 255)
    assert answerer.built["image_policy"] == "correct"
    assert answerer.built["max_image_pixels"] == 48
    assert answerer.built["allowed_media_hosts"] == ["a.example", ".b"]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image-policy", "strict"], "image_policy='strict' refuses transparency"),
        (["--max-image-pixels", "47"], "must have at most 47 pixels, got 8 x 6"),
        (["--max-image-pixels", "0"], "max_image_pixels must be a whole number above 0"),
        (["--allow-host", "https://a.example"], "must be names of hosts"),
        (["--image-policy", "exact"], "invalid choice: 'exact'"),
        (["--image", URL], "no allowed host (allowed_media_hosts, --allow-host)"),
        (["--image", URL, "--allow-host", "other.example"], "'pictures.example' is not allowed"),
    ],
)
def test_violations_print_one_line_and_exit_with_2(
    command: str, options: list[str], says: str, clear: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    try:
        code = main([command, *prompt, "--image", clear, *options])
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_warning_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "moving.gif").write_bytes(frames("GIF"))
    moving = str(tmp_path / "moving.gif")
    argv = ["generate", "--prompt", "x", "--image-policy", "correct", "--image", moving]
    command = [sys.executable, "-m", "idefics2_engine", *argv, "--image", "no/such.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    warning, error = done.stderr.splitlines()
    assert warning.startswith("idefics2: warning: ")
    assert warning.endswith("moving.gif: has several frames or pages, only the current one is read")
    assert error.startswith("idefics2: error: no/such.png")


def test_llm_accepts_the_image_options(checkpoint: Path, tmp_path: Path) -> None:
    llm = LLM(
        checkpoint,
        device="cpu",
        image_policy="correct",
        max_image_pixels=5000,
        max_media_bytes=20000,
        allowed_media_root=tmp_path,
        allowed_media_hosts=["a.example"],
        media_timeout=3,
        image_threads=2,
    )
    media = llm.processor.media
    assert media.image_policy is ImagePolicy.CORRECT
    assert (media.max_image_pixels, media.max_media_bytes) == (5000, 20000)
    assert media.allowed_media_hosts == ("a.example",)
    assert (media.media_timeout, media.num_threads) == (3, 2)
    with pytest.raises(MediaNotAllowedError, match="must lie below the allowed folder"):
        llm.generate({"prompt": "<image>", "multi_modal_data": {"image": "/etc/passwd"}})
    with pytest.raises(ConfigError, match="image_policy must be one of"):
        LLM(checkpoint, image_policy="other")


def test_llm_reads_images_in_order_and_names_the_invalid_one(
    checkpoint: Path,
) -> None:
    images = [noise(50 + n, 90) for n in range(6)]
    short = SamplingParams(temperature=0.0, max_tokens=2)
    answers = []
    for threads in (1, 4):
        llm = LLM(checkpoint, device="cpu", dtype="float32", image_threads=threads)
        prompts = [{"prompt": "<image>a", "multi_modal_data": {"image": i}} for i in images]
        raw = [output.outputs[0].token_ids for output in llm.generate(prompts, short)]
        files: list[Any] = [file(image, "PNG") for image in images]
        chats = [[{"role": "user", "content": [{"type": "image", "image": f}]}] for f in files]
        chatted = [output.outputs[0].token_ids for output in llm.chat(chats, short)]
        answers.append((raw, chatted))
        chats[4] = [{"role": "user", "content": [{"type": "image", "image": b"bad"}]}]
        with pytest.raises(
            ImageError, match=r"^images\[0\] of messages\[4\]: image bytes: must be"
        ):
            llm.chat(chats, short)
        pair = {"prompt": "<image><image>", "multi_modal_data": {"image": [images[0], b"bad"]}}
        with pytest.raises(ImageError, match=r"^images\[1\]: image bytes: must be"):
            next(llm.stream(pair))
    assert answers[0] == answers[1]


def test_tensor_and_array_give_the_same_answer(
    checkpoint: Path,
) -> None:
    import torch

    llm = LLM(checkpoint, device="cpu", dtype="float32")
    array = np.array(noise(60, 50))
    sources: list[Any] = [array, torch.from_numpy(array).permute(2, 0, 1), Image.fromarray(array)]
    prompts = [{"prompt": "<image>a", "multi_modal_data": {"image": one}} for one in sources]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=3))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
