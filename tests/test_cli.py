"""The command line, against a stand-in that answers at once and against the demo checkpoint."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image

import idefics2_engine
from idefics2_engine import SamplingParams
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import PromptError, PromptTooLongError

ANSWER = "Two red circles."
COMMAND = [sys.executable, "-m", "idefics2_engine"]


class FakeLLM:
    """Says ``ANSWER`` a word at a time and keeps what it was asked."""

    built: ClassVar[tuple[Any, dict[str, Any]]]
    asked: ClassVar[list[tuple[Any, SamplingParams]]] = []
    words = ANSWER.split()
    failure: BaseException | None = None  # raised after the first word

    def __init__(self, model: Any = None, **settings: Any) -> None:
        FakeLLM.built = (model, settings)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[SimpleNamespace]:
        FakeLLM.asked.append((prompt, params))
        for n in range(1, len(self.words) + 1):
            done = n == len(self.words)
            answer = SimpleNamespace(
                text=" ".join(self.words[:n]),
                token_ids=list(range(n)),
                finish_reason="stop" if done else None,
                stop_reason=None,
            )
            yield SimpleNamespace(outputs=[answer], prompt_token_ids=[1] * 70, finished=done)
            if self.failure:
                raise self.failure


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(idefics2_engine), "LLM", FakeLLM)
    monkeypatch.setattr(FakeLLM, "asked", [])


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return str(path)


def exit_code(argv: list[str]) -> int | str | None:
    """What the process would exit with."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def sit_at_a_terminal(monkeypatch: pytest.MonkeyPatch, *events: str | BaseException) -> None:
    """Answer each prompt with the next of ``events``, or raise it; then Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    left = iter(events)

    def fake_input(prompt: str) -> str:
        event = next(left, EOFError())
        if isinstance(event, BaseException):
            raise event
        return event

    monkeypatch.setattr("builtins.input", fake_input)


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The roles and texts of a conversation, ``<image>`` for each image."""
    return [
        (
            message["role"],
            "".join(c["text"] if c["type"] == "text" else "<image>" for c in message["content"]),
        )
        for message in messages
    ]


class TestHelp:
    @pytest.mark.parametrize("argv", [[], ["generate"], ["chat"]])
    def test_loads_nothing_heavy(self, argv: list[str]) -> None:
        code = (
            "import sys; from idefics2_engine.cli.main import main\n"
            f"try: main({[*argv, '--help']!r})\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "sys.exit(', '.join({'torch', 'numpy', 'PIL', 'triton'} & set(sys.modules)) or None)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert "usage: idefics2" in result.stdout

    def test_takes_less_than_half_a_second(self) -> None:
        seconds = []
        for _ in range(5):  # the best of five: other tests run beside this one
            start = time.perf_counter()
            subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.5

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert exit_code(["--version"]) == 0
        assert capsys.readouterr().out == f"idefics2-engine {idefics2_engine.__version__}\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "COMMAND"),
            (["guess"], "guess"),
            (["generate"], "--prompt"),
            (["generate", "--prompt", "x", "--json", "--stream"], "--json"),
            (["generate", "--prompt", "x", "--temp", "1"], "--temp"),  # no abbreviations
            (["generate", "--prompt", "x", "--max-tokens", "many"], "many"),
            (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
            (["generate", "--prompt", "x", "--temperature", "nan"], "temperature"),
            (["generate", "--prompt", "x", "--top-p", "0.9"], "--temperature"),
            (["generate", "--prompt", "x", "--device", "tpu"], "tpu"),
            (["generate", "--prompt", "x", "--dtype", "int8"], "int8"),
            (["generate", "--prompt", "x", "--image", "no/such.png"], "no/such.png"),
            (["generate", "--prompt", "x", "--model", "nosuch"], "no such folder"),
            (["generate", "--prompt", "x", "--model", "no/such/folder"], "no such folder"),
            (["generate", "--prompt", "x", "--model", "no/such@"], "no such folder"),
            (["generate", "--prompt", "x", "--model", __file__], "no such folder"),
            (["generate", "--prompt", "x", "--model", "o" * 5000], "no such folder"),
            (["generate", "--prompt", "x", "--model", "~nosuchuser"], "no such folder"),
            (["generate", "--prompt", "x", "--adapter", "nosuch"], "--adapter: no such folder"),
            (["chat", "--image", "no/such.png"], "no/such.png"),
        ],
    )
    def test_bad_input_is_one_line_and_2(
        self, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert exit_code(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert says in err

    @pytest.mark.parametrize(
        ("argv", "error"),
        [
            (["--max-tokens", "0"], {"code": "sampling"}),
            (["--image", "no/such.png"], {"code": "image"}),
            (["--image", "\udcff.png"], {"code": "image"}),  # a name in another encoding
            ([], {"code": "prompt_too_long"}),  # by the engine, below
        ],
    )
    def test_json_is_json_when_it_fails_too(
        self,
        argv: list[str],
        error: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(FakeLLM, "failure", PromptTooLongError(12, 12))
        assert main(["generate", "--json", "--prompt", "é", *argv]) == 2
        out, err = capsys.readouterr()
        result = json.loads(out)
        assert out.count("\n") == 1
        assert result == {"error": error | {"message": result["error"]["message"]}}
        assert err == f"idefics2: error: {result['error']['message']}\n"

    def test_not_an_image(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "text.png").write_text("no pixels")
        argv = ["generate", "--prompt", "x", "--image", str(tmp_path / "text.png")]
        assert exit_code(argv) == 2
        assert "text.png" in capsys.readouterr().err

    def test_interrupted(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(FakeLLM, "failure", KeyboardInterrupt())
        assert exit_code(["generate", "--prompt", "x"]) == 130
        assert capsys.readouterr().out == ""

    def test_other_failures_keep_their_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeLLM, "failure", RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):  # Python exits with 1
            main(["generate", "--prompt", "x"])


class TestGenerate:
    def test_prints_the_answer(self, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--image", picture, "--image", picture, "--prompt", "Why?"]) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"
        ((messages, _),) = FakeLLM.asked
        assert texts(messages) == [("user", "<image><image>Why?")]
        assert messages[0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)

    def test_streams_what_is_new(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--stream", "--prompt", "Why?"]) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"

    def test_json(self, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--json", "--image", picture, "--prompt", "Why?"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        result = json.loads(out)
        seconds = [result.pop(f"{name}_seconds") for name in ("load", "first_token", "generate")]
        assert min(seconds) >= 0
        assert seconds[1] <= seconds[2]
        assert result == {
            "text": ANSWER,
            "finish_reason": "stop",
            "stop_reason": None,
            "images": 1,
            "prompt_tokens": 70,
            "completion_tokens": 3,
        }

    def test_raw(self, picture: str) -> None:
        assert main(["generate", "--raw", "--image", picture, "--prompt", "<image>In"]) == 0
        ((prompt, _),) = FakeLLM.asked
        assert prompt["prompt"] == "<image>In"
        assert [image.size for image in prompt["multi_modal_data"]["image"]] == [(8, 6)]

    def test_greedy_with_the_checkpoint_s_settings_by_default(self) -> None:
        assert main(["generate", "--prompt", "x"]) == 0
        settings = {
            "adapter": None,
            "verify": False,
            "check_finite": False,
            "device": "auto",
            "dtype": "auto",
            "quantization": None,
            "quantized_parts": None,
            "double_quant": True,
            "split_images": None,
            "max_num_seqs": 1,
        }
        seed = FakeLLM.built[1].pop("seed")
        assert FakeLLM.built == (None, settings)
        assert FakeLLM.asked[0][1] == SamplingParams(temperature=0.0, max_tokens=256)
        assert main(["generate", "--prompt", "x"]) == 0
        assert FakeLLM.built[1]["seed"] != seed, "drawn answers differ from run to run"

    def test_every_option_arrives(self, tmp_path: Path) -> None:
        checks = ["--adapter", "org/lora@main", "--verify", "--check-finite"]
        model = [
            "--model",
            str(tmp_path),
            *checks,
            "--device",
            "cuda:1",
            "--dtype",
            "float16",
            "--quantization",
            "nf4",
            "--quantized-part",
            "text",
            "--quantized-part",
            "vision",
            "--no-double-quant",
            "--no-split",
        ]
        sampling = (
            "--temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.2 --seed 3 "
            "--max-tokens 9 --min-tokens 2 --stop a --stop b --stop-token-id 4 --stop-token-id 5"
        )
        assert main(["generate", "--prompt", "x", *model, *sampling.split()]) == 0
        del FakeLLM.built[1]["seed"]
        assert FakeLLM.built == (
            tmp_path,
            {
                "adapter": "org/lora@main",
                "verify": True,
                "check_finite": True,
                "device": "cuda:1",
                "dtype": "float16",
                "quantization": "nf4",
                "quantized_parts": ["text", "vision"],
                "double_quant": False,
                "split_images": False,
                "max_num_seqs": 1,
            },
        )
        assert FakeLLM.asked[0][1] == SamplingParams(
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            repetition_penalty=1.2,
            seed=3,
            max_tokens=9,
            min_tokens=2,
            stop=("a", "b"),
            stop_token_ids=(4, 5),
        )

    def test_a_hub_id_arrives_as_it_is(self) -> None:
        assert main(["generate", "--prompt", "x", "--model", "org/name@v1.0"]) == 0
        assert FakeLLM.built[0] == "org/name@v1.0"


class TestChatOverAPipe:
    def test_prints_the_answers_alone_and_remembers(
        self, picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        type_lines(monkeypatch, f"/image {picture}", "What?", "", "Where?", "/reset", " /etc?")
        assert main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == (f"{ANSWER}\n" * 3, "")
        first = [("user", "<image>What?")]
        second = [*first, ("assistant", ANSWER), ("user", "Where?")]
        third = [("user", "/etc?")]
        assert [texts(messages) for messages, _ in FakeLLM.asked] == [first, second, third]

    def test_what_is_no_text_ends_it(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        typed = io.TextIOWrapper(io.BytesIO(b"What?\n\xff\n"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", typed)
        assert main(["chat"]) == 2
        assert "standard input: must be text in UTF-8" in capsys.readouterr().err

    def test_images_of_the_command_line_go_with_the_first_message(
        self, picture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        type_lines(monkeypatch, "What?")
        assert main(["chat", "--image", picture]) == 0
        assert texts(FakeLLM.asked[0][0]) == [("user", "<image>What?")]

    def test_quit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        type_lines(monkeypatch, "What?", "/quit", "Where?")
        assert main(["chat"]) == 0
        assert len(FakeLLM.asked) == 1

    @pytest.mark.parametrize("line", ["/image no/such.png", "/images a.png"])
    def test_an_error_ends_it(
        self, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        type_lines(monkeypatch, line, "What?")
        assert main(["chat"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert line.split()[-1] in err or line.split()[0] in err
        assert FakeLLM.asked == []

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeLLM, "failure", KeyboardInterrupt())
        type_lines(monkeypatch, "What?", "Where?")
        assert main(["chat"]) == 130
        assert len(FakeLLM.asked) == 1


class TestChatAtATerminal:
    def test_ctrl_c_stops_the_answer_and_keeps_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeLLM, "failure", KeyboardInterrupt())
        sit_at_a_terminal(monkeypatch, "What?", "Where?")
        assert main(["chat"]) == 0
        second = [("user", "What?"), ("assistant", "Two"), ("user", "Where?")]
        assert texts(FakeLLM.asked[1][0]) == second

    def test_ctrl_c_at_the_prompt_and_errors_go_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sit_at_a_terminal(
            monkeypatch, KeyboardInterrupt(), "/image no.png", "/what", "/help", "Hm?"
        )
        assert main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert "no.png" in err
        assert "/what" in err
        assert "/reset" in out
        assert out.rstrip().endswith(ANSWER)

    def test_a_failed_question_is_not_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeLLM, "failure", PromptError("too long"))
        sit_at_a_terminal(monkeypatch, "What?", "Where?")
        assert main(["chat"]) == 0
        assert texts(FakeLLM.asked[1][0]) == [("user", "Where?")]


class TestDemo:
    """The demo checkpoint, in processes of its own."""

    def run(self, *argv: str, typed: str = "") -> tuple[int, str, str]:
        done = subprocess.run([*COMMAND, *argv], input=typed, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def test_generate(self) -> None:
        before, after = (str(DEMO_IMAGES / name) for name in ("before.png", "after.png"))
        question = "What's the difference between these two images?"
        code, out, err = self.run(
            "generate", "--json", "--image", before, "--image", after, "--prompt", question
        )
        assert (code, err) == (0, "")
        result = json.loads(out)
        assert result["text"] == (
            "The diamond at the bottom left is green in the first image and red in the second."
        )
        assert result["finish_reason"] == "stop"
        assert result["images"] == 2
        assert result["completion_tokens"] > 10

    def test_chat_over_a_pipe(self) -> None:
        picture = DEMO_IMAGES / "shapes.png"
        typed = f"/image {picture}\nWhat is at the top left?\nAnd at the bottom right?\n"
        assert self.run("chat", typed=typed) == (0, "A red circle.\nA purple square.\n", "")

    def test_a_reader_that_left_is_no_traceback(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            done = subprocess.run(
                [*COMMAND, "generate", "--prompt", "Hello"],
                stdout=pipe,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert (done.returncode, done.stderr) == (1, "")
