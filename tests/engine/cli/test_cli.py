"""The command line, against a fake model that answers at once and against the demo checkpoint."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
import torch
from PIL import Image

import idefics2_engine
from idefics2_engine import SamplingParams
from idefics2_engine.cli import chat, generate, options
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from idefics2_engine.errors import PromptError, PromptTooLongError
from idefics2_engine.outputs import Logprob

ANSWER = "Two red circles."
LOGPROBS = {7: Logprob(-0.5, 1, " a"), 9: Logprob(-math.inf, 2, " b")}
COMMAND = [sys.executable, "-m", "idefics2_engine"]


class FakeLLM:
    """A model that answers ``ANSWER`` a word at a time and records its questions."""

    built: ClassVar[tuple[Any, dict[str, Any]]]
    asked: ClassVar[list[tuple[Any, SamplingParams]]] = []
    words: ClassVar[list[str]] = ANSWER.split()
    # Raised after the first word
    failure: BaseException | None = None
    # Called before each word
    at_word: Callable[[int], None] = staticmethod(lambda number: None)
    model: ClassVar = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    config: ClassVar = SimpleNamespace(is_quantized=False)

    def __init__(self, model: Any = None, **settings: Any) -> None:
        FakeLLM.built = (model, settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[SimpleNamespace]:
        FakeLLM.asked.append((prompt, params))
        for n in range(1, len(self.words) + 1):
            self.at_word(n)
            done = n == len(self.words)
            answers = [
                SimpleNamespace(
                    index=index,
                    text=" ".join(self.words[:n]),
                    token_ids=list(range(n)),
                    finish_reason="stop" if done else None,
                    stop_reason=None,
                    logprobs=None if params.logprobs is None else [LOGPROBS] * n,
                )
                for index in range(params.n)
            ]
            yield SimpleNamespace(outputs=answers, prompt_token_ids=[1] * 70, finished=done)
            if self.failure:
                raise self.failure


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(idefics2_engine), "LLM", FakeLLM)
    monkeypatch.setattr(options, "model_folder", lambda model: DEMO_MODEL)
    monkeypatch.setattr(FakeLLM, "asked", [])


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return str(path)


def exit_code(argv: list[str]) -> int | str | None:
    """Return the exit code of the process."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str = "utf-8") -> None:
    stream = io.TextIOWrapper(io.BytesIO(data), encoding=encoding, errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stream)


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    pipe_in(monkeypatch, "".join(f"{line}\n" for line in lines).encode())


def sit_at_a_terminal(monkeypatch: pytest.MonkeyPatch, *events: str | BaseException) -> None:
    """Answer each prompt with the next of ``events``, or raise it; then send Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, closed=False))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    left = iter(events)

    def fake_input(prompt: str) -> str:
        event = next(left, EOFError())
        if isinstance(event, BaseException):
            raise event
        return event

    monkeypatch.setattr("builtins.input", fake_input)


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the roles and texts of a conversation, with ``<image>`` for each image."""
    return [
        (
            message["role"],
            "".join(c["text"] if c["type"] == "text" else "<image>" for c in message["content"]),
        )
        for message in messages
    ]


class TestHelp:
    @pytest.mark.parametrize("argv", [[], ["generate"], ["chat"], ["run"]])
    def test_help_imports_only_the_standard_library(self, argv: list[str]) -> None:
        # Modules that a bare interpreter has loaded already are not counted. Only this package and
        # the standard library may be new.
        code = (
            "import sys; before = set(sys.modules)\n"
            "from idefics2_engine.cli.main import main\n"
            f"try: main({[*argv, '--help']!r})\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
            "sys.exit(', '.join(new - set(sys.stdlib_module_names) - {'idefics2_engine'}) or None)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert "usage: idefics2" in result.stdout

    def test_version_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert exit_code(["--version"]) == 0
        assert capsys.readouterr().out == f"idefics2-engine {idefics2_engine.__version__}\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "COMMAND"),
            (["guess"], "guess"),
            (["generate"], "--prompt"),
            # Options cannot be abbreviated
            (["generate", "--prompt", "x", "--temp", "1"], "--temp"),
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
    def test_invalid_input_prints_one_line_and_exits_with_2(
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
            # This is a name in another encoding
            (["--image", "\udcff.png"], {"code": "image"}),
            # ``--json`` and ``--stream`` exclude each other
            (["--stream"], {"code": "bad_input"}),
            (["--max-tokens", "many"], {"code": "bad_input"}),
            (["--model", "nosuch"], {"code": "bad_input"}),
            # The engine below raises this error
            ([], {"code": "prompt_too_long"}),
        ],
    )
    def test_errors_are_json_with_json(
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
        command = "idefics2 generate" if error["code"] == "bad_input" else "idefics2"
        assert err == f"{command}: error: {result['error']['message']}\n"

    def test_file_that_is_not_an_image_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
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
        # Python then exits with 1
        with pytest.raises(RuntimeError, match="out of memory"):
            main(["generate", "--prompt", "x"])


class TestGenerate:
    def test_answer_is_printed(self, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--image", picture, "--image", picture, "--prompt", "Why?"]) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"
        ((messages, _),) = FakeLLM.asked
        assert texts(messages) == [("user", "<image><image>Why?")]
        assert messages[0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)

    def test_stream_prints_only_new_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--stream", "--prompt", "Why?"]) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"

    def test_json_holds_answer_and_counts(
        self, picture: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["generate", "--json", "--image", picture, "--prompt", "Why?"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        result = json.loads(out)
        seconds = [result.pop(f"{name}_seconds") for name in ("load", "first_token", "generate")]
        assert min(seconds) >= 0
        assert seconds[1] <= seconds[2]
        assert result == {
            "index": 0,
            "text": ANSWER,
            "finish_reason": "stop",
            "stop_reason": None,
            "images": 1,
            "prompt_tokens": 70,
            "completion_tokens": 3,
            "model": "demo",
            "adapter": None,
            "quantization": None,
            "device": "cpu",
            "dtype": "float32",
        }

    @pytest.mark.parametrize("is_quantized", [False, True])
    def test_json_names_model_and_device(
        self,
        is_quantized: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        model = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float16)
        monkeypatch.setattr(FakeLLM, "model", model)
        monkeypatch.setattr(FakeLLM, "config", SimpleNamespace(is_quantized=is_quantized))
        options = ["--model", "org/name@main", "--adapter", "org/lora"]
        options += [] if is_quantized else ["--quantization", "nf4"]
        assert main(["generate", "--json", "--prompt", "Why?", *options]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model"] == "org/name@main"
        assert result["adapter"] == "org/lora"
        assert result["quantization"] == "nf4"
        assert (result["device"], result["dtype"]) == ("cuda:1", "float16")

    def test_raw_passes_the_prompt_unchanged(self, picture: str) -> None:
        assert main(["generate", "--raw", "--image", picture, "--prompt", "<image>In"]) == 0
        ((prompt, _),) = FakeLLM.asked
        assert prompt["prompt"] == "<image>In"
        assert [image.size for image in prompt["multi_modal_data"]["image"]] == [(8, 6)]

    def test_defaults_are_greedy_with_the_checkpoints_settings(self) -> None:
        assert main(["generate", "--prompt", "x"]) == 0
        settings = {
            "adapter": None,
            "merge_adapter": None,
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

    def test_every_option_is_passed_on(self, tmp_path: Path) -> None:
        checks = ["--adapter", "org/lora@main", "--no-merge-adapter", "--verify", "--check-finite"]
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
                "merge_adapter": False,
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

    def test_hub_id_is_passed_unchanged(self) -> None:
        assert main(["generate", "--prompt", "x", "--model", "org/name@v1.0"]) == 0
        assert FakeLLM.built[0] == "org/name@v1.0"

    def test_several_answers_and_log_probabilities(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn = ["generate", "--prompt", "x", "--temperature", "1", "--n", "2"]
        assert main(drawn) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n\n{ANSWER}\n"
        assert main([*drawn, "--json", "--logprobs", "1"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["index"] for line in lines] == [0, 1]
        likely = {"id": 7, "token": " a", "logprob": -0.5, "rank": 1}
        never = {"id": 9, "token": " b", "logprob": None, "rank": 2}
        assert lines[1]["logprobs"] == [[likely, never]] * 3
        assert FakeLLM.built[1]["max_num_seqs"] == 2
        assert FakeLLM.asked[1][1] == SamplingParams(temperature=1, max_tokens=256, n=2, logprobs=1)

    def test_prompt_or_image_may_come_from_standard_input(
        self, picture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe_in(monkeypatch, b"\xef\xbb\xbfWhy\r\n\xc3\xa9?\r\n")
        assert main(["generate", "--image", picture, "--prompt", "-"]) == 0
        pipe_in(monkeypatch, Path(picture).read_bytes())
        assert main(["generate", "--image", "-", "--prompt", "Why?"]) == 0
        asked = [texts(messages) for messages, _ in FakeLLM.asked]
        assert asked == [[("user", "<image>Why\r\né?")], [("user", "<image>Why?")]]
        assert FakeLLM.asked[1][0][0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize(
        ("argv", "data", "message"),
        [
            (["--image", "-", "--image", "-", "--prompt", "x"], b"", "one standard input"),
            (["--image", "-", "--prompt", "-"], b"", "one standard input"),
            (["--image", "-", "--prompt", "x"], b"no pixels", "image bytes: "),
            (["--prompt", "-"], b"\xff", "standard input: must be text in UTF-8"),
            (
                ["--prompt", "-"],
                b"a" * ((16 << 20) + 1),
                "at most 16777216 bytes at once, got more",
            ),
            (["--prompt", "x", "--n", "2"], b"", "--n above 1 has no effect without --temperature"),
            (["--prompt", "x", "--n", "0"], b"", "n must be an integer from 1 to"),
            (["--prompt", "x", "--stream", "--n", "2", "--temperature", "1"], b"", "--stream"),
            (["--prompt", "x", "--logprobs", "2"], b"", "--logprobs must come with --json"),
            (["--prompt", "x", "--json", "--logprobs", "-2"], b"", "logprobs must be an integer"),
        ],
    )
    def test_conflicting_arguments_are_refused(
        self,
        argv: list[str],
        data: bytes,
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pipe_in(monkeypatch, data)
        assert main(["generate", *argv]) == 2
        assert message in capsys.readouterr().err
        assert FakeLLM.asked == []

    def test_loading_time_excludes_imports(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = [0.0]

        def imported(name: str) -> Any:
            """Take 100 s at the first look-up, which imports, and 1 s to load."""
            if name == "SamplingParams":
                return SamplingParams
            clock[0] += 100
            monkeypatch.setitem(vars(idefics2_engine), "LLM", SlowLLM)
            return SlowLLM

        class SlowLLM(FakeLLM):
            def __init__(self, model: Any = None, **settings: Any) -> None:
                clock[0] += 1

        monkeypatch.delitem(vars(idefics2_engine), "LLM")
        monkeypatch.setattr(idefics2_engine, "__getattr__", imported)
        monkeypatch.setattr(generate, "perf_counter", lambda: clock[0])
        assert main(["generate", "--json", "--prompt", "x"]) == 0
        assert json.loads(capsys.readouterr().out)["load_seconds"] == 1

    @pytest.mark.parametrize(
        ("environment", "option", "size", "wanted"),
        [
            (None, [], 1, [1]),
            # torch chooses the number
            (None, [], 1 << 30, []),
            # torch has read the variable
            ("3", [], 1, []),
            ("3", ["--threads", "2"], 1, [2]),
            (None, ["--threads", "2"], 1 << 30, [2]),
        ],
    )
    def test_threads_are_set_before_the_model_is_loaded(
        self,
        environment: str | None,
        option: list[str],
        size: int,
        wanted: list[int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        class LateLLM(FakeLLM):
            def __init__(self, model: Any = None, **settings: Any) -> None:
                assert chosen == wanted

        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
        chosen: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        monkeypatch.setitem(vars(idefics2_engine), "LLM", LateLLM)
        monkeypatch.setattr(options, "model_folder", lambda model: tmp_path)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if environment:
            monkeypatch.setenv("OMP_NUM_THREADS", environment)
        assert main(["generate", "--prompt", "x", *option]) == 0
        assert chosen == wanted

    @pytest.mark.parametrize("threads", ["0", "-1", "2.5", "many", "\u0661", "10000"])
    def test_invalid_numbers_of_threads_are_refused(
        self, threads: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["generate", "--prompt", "x", f"--threads={threads}"]) == 2
        assert "expected a whole number from 1 to 9999" in capsys.readouterr().err


class TestChatOverAPipe:
    def test_only_answers_are_printed_and_turns_are_kept(
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

    def test_invalid_utf8_ends_the_chat(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipe_in(monkeypatch, b"What?\n\xff\n")
        assert main(["chat"]) == 2
        assert "standard input: must be text in UTF-8" in capsys.readouterr().err

    def test_byte_order_marks_and_windows_line_ends_are_ignored(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe_in(monkeypatch, b"\xef\xbb\xbf/reset\r\nWhat?\r\n\xef\xbb\xbf/quit\r\nNo?\r\n")
        assert main(["chat"]) == 0
        assert [texts(messages) for messages, _ in FakeLLM.asked] == [[("user", "What?")]]

    def test_lines_use_the_encoding_of_the_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe_in(monkeypatch, b"\xe9?\n", encoding="latin-1")
        assert main(["chat"]) == 0
        assert texts(FakeLLM.asked[0][0]) == [("user", "é?")]

    @pytest.mark.parametrize("stream", [None, "closed"])
    def test_missing_standard_input_is_an_error(
        self,
        stream: str | None,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stdin", closed if stream else None)
        assert main(["chat"]) == 2
        assert "standard input: must be open" in capsys.readouterr().err
        assert main(["chat", "--image", "-"]) == 2
        assert "standard input is the conversation's" in capsys.readouterr().err

    def test_images_of_the_command_line_belong_to_the_first_message(
        self, picture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        type_lines(monkeypatch, "What?")
        assert main(["chat", "--image", picture]) == 0
        assert texts(FakeLLM.asked[0][0]) == [("user", "<image>What?")]

    def test_quit_ends_the_chat(self, monkeypatch: pytest.MonkeyPatch) -> None:
        type_lines(monkeypatch, "What?", "/quit", "Where?")
        assert main(["chat"]) == 0
        assert len(FakeLLM.asked) == 1

    @pytest.mark.parametrize("line", ["/image no/such.png", "/images a.png"])
    def test_error_ends_the_chat(
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
    def test_ctrl_c_stops_the_answer_and_keeps_its_text(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeLLM, "failure", KeyboardInterrupt())
        sit_at_a_terminal(monkeypatch, "What?", "Where?")
        assert main(["chat"]) == 0
        second = [("user", "What?"), ("assistant", "Two"), ("user", "Where?")]
        assert texts(FakeLLM.asked[1][0]) == second

    def test_ctrl_c_before_the_first_word_drops_the_question(
        self, picture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        presses = iter([signal.SIGINT])

        def press_once(_word: int) -> None:
            for press in presses:
                signal.raise_signal(press)

        monkeypatch.setattr(FakeLLM, "at_word", staticmethod(press_once))
        sit_at_a_terminal(monkeypatch, f"/image {picture}", "What?", "Where?")
        assert main(["chat"]) == 0
        asked = [texts(messages) for messages, _ in FakeLLM.asked]
        assert asked == [[("user", "<image>What?")], [("user", "<image>Where?")]]

    def test_ctrl_c_at_any_line_leaves_the_conversation_consistent(
        self, picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Press Ctrl-C at each line of chat.py in turn, one conversation a line."""

        def talk(press_at: int) -> int:
            """Press Ctrl-C at line ``press_at``, then ask until there is an answer.

            Return the number of lines that ran.
            """
            lines = 0

            def trace(frame: FrameType, event: str, arg: object) -> Any:
                nonlocal lines
                if frame.f_code.co_filename != chat.__file__:
                    return None
                if not frame.f_code.co_qualname.startswith(("talk", "Chat.")):
                    return None
                if event == "line":
                    lines += 1
                    if lines == press_at:
                        signal.raise_signal(signal.SIGINT)
                return trace

            FakeLLM.asked.clear()
            typed = [f"/image {picture}", "What?", "And?", "And?"]
            sit_at_a_terminal(monkeypatch, *typed)

            def traced() -> Iterator[int]:
                before = sys.gettrace()
                sys.settrace(trace)
                try:
                    yield main(["chat"])
                finally:
                    sys.settrace(before)

            # In Python 3.11, if a trace function raises in its handler, the exception stays the one
            # being handled. A generator has its own exception state, so later tests do not see it.
            assert list(traced()) == [0]
            return lines

        total = talk(0)
        assert total > 50
        whole = [texts(messages) for messages, _ in FakeLLM.asked]
        for press_at in range(1, total + 1):
            talk(press_at)
            last = texts(FakeLLM.asked[-1][0])
            assert [role for role, _ in last] == [
                ("user", "assistant")[i % 2] for i in range(len(last))
            ]
            said = [text for role, text in last if role == "assistant"]
            assert all(ANSWER.startswith(text) and text for text in said)
            shown = sum(text.count("<image>") for _, text in last)
            assert shown <= 1
            assert len(last) >= len(whole[-1]) - 2, "one question may go unanswered, no more"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_chat_continues_after_ctrl_c_at_the_prompt_and_errors(
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

    def test_failed_question_is_not_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeLLM, "failure", PromptError("too long"))
        sit_at_a_terminal(monkeypatch, "What?", "Where?")
        assert main(["chat"]) == 0
        assert texts(FakeLLM.asked[1][0]) == [("user", "Where?")]


class TestStreams:
    """Tests of standard streams that are absent, closed, full, unread, or in a narrow encoding."""

    def shell(self, line: str) -> tuple[int, str, str]:
        """Run ``line`` with the command for ``idefics2``; return the exit code and both outputs."""
        line = line.replace("idefics2", f"{sys.executable} -m idefics2_engine")
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    @pytest.mark.parametrize(
        ("line", "result"),
        [
            (
                "idefics2 --version > /dev/full",
                (1, "", "idefics2: error: standard output: no space left on device\n"),
            ),
            (
                "idefics2 --version >&-",
                (1, "", "idefics2: error: standard output: bad file descriptor\n"),
            ),
            ("idefics2 guess 2> /dev/full", (2, "", "")),
            # An error is never printed on standard output
            ("idefics2 guess 2>&-", (2, "", "")),
            ("idefics2 guess 2>&- >&- <&-", (2, "", "")),
            (
                "idefics2 generate --prompt - --json <&-",
                (
                    2,
                    '{"error": {"code": "prompt", "message": "standard input: must be open, got it closed"}}\n',
                    "idefics2: error: standard input: must be open, got it closed\n",
                ),
            ),
        ],
    )
    def test_broken_streams_print_no_traceback(
        self, line: str, result: tuple[int, str, str]
    ) -> None:
        assert self.shell(line) == result

    def test_closed_pipe_exits_silently_with_141(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            command = [*COMMAND, "--help"]
            done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (141, "")

    def test_files_do_not_reuse_a_closed_streams_number(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from idefics2_engine.cli import streams\n"
            "os.close(1); os.close(2); streams.occupy_descriptors()\n"
            f"assert open({str(tmp_path / 'file')!r}, 'w').fileno() > 2"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_narrow_encoding_replaces_characters(
        self,
        encoding: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(FakeLLM, "words", ["é🦩"])
        printed = []
        for form in ([], ["--stream"], ["--json"]):
            raw = io.BytesIO()
            narrow = io.TextIOWrapper(raw, encoding=encoding)
            monkeypatch.setattr(sys, "stdout", narrow)
            assert main(["generate", "--prompt", "x", *form]) == 0
            printed.append(raw.getvalue().decode(encoding))
        assert printed[0] == printed[1] == ("??\n" if encoding == "ascii" else "é?\n")
        assert json.loads(printed[2])["text"] == "é🦩"

    @pytest.mark.parametrize("form", [[], ["--json"], ["--stream"]])
    def test_missing_standard_output_is_an_error(
        self, form: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdout", None)
        assert main(["generate", "--prompt", "x", *form]) == 1
        assert capsys.readouterr().err == "idefics2: error: standard output: bad file descriptor\n"
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["generate", "--prompt", "x", *form]) == 1

    def test_broken_pipe_elsewhere_keeps_its_traceback(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeLLM, "failure", BrokenPipeError(32, "a socket's"))
        with pytest.raises(BrokenPipeError):
            main(["generate", "--prompt", "x"])


class TestInterruptedImports:
    """Tests of Ctrl-C during imports: an import sends the signal, in a separate process."""

    CODE = """
import os, runpy, signal, sys

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
if {is_ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["idefics2", *{argv!r}]
runpy.run_module("idefics2_engine", run_name="__main__", alter_sys=True)
"""

    def run(self, argv: list[str], module: str, is_ignored: bool = False) -> tuple[int, str, str]:
        code = self.CODE.format(argv=argv, module=module, is_ignored=is_ignored)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    @pytest.mark.parametrize("module", ["argparse", "idefics2_engine.cli.chat", "PIL", "torch"])
    def test_ctrl_c_during_imports_exits_with_130(self, module: str) -> None:
        argv = ["generate", "--prompt", "x", "--image", str(DEMO_IMAGES / "shapes.png")]
        assert self.run(argv, module) == (130, "", "idefics2: interrupted\n")

    def test_ignored_signal_stays_ignored(self) -> None:
        code, out, err = self.run(["--version"], "argparse", is_ignored=True)
        assert (code, err) == (0, "")
        assert out.startswith("idefics2-engine ")


class TestDemo:
    """Tests of the demo checkpoint in separate processes."""

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
