"""``idefics2 chat``: a conversation in the terminal, or over a pipe with one message a line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options
from idefics2_engine.errors import Idefics2Error, PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

    from idefics2_engine import LLM, SamplingParams

_HELP = """\
/image FILE   show an image with the next message; repeat it for several
/reset        forget the conversation and the images
/help         show this
/quit         leave, as does Ctrl-D
Ctrl-C stops an answer. Begin a message with a space if its first character is a /."""


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk about images in the terminal",
        description="Talk about images in the terminal. From a pipe each line is a message, only the\n"
        "answers are printed, and the first error ends it.",
        epilog="in the conversation:\n" + _HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_image_option(parser)
    options.add_model_options(parser)
    options.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends and return the exit code."""
    params = options.sampling_params(args)
    images = [options.read_image(name, args) for name in args.images]
    chat = _Chat(options.load_llm(args), params, args, images)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _talk(chat)
    else:
        for line in _lines():
            if not chat.take(line.rstrip("\n")):
                break
    return 0


def _lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError:
        raise PromptError("standard input: must be text in UTF-8") from None


def _talk(chat: "_Chat") -> None:
    """Prompt for messages; an error or Ctrl-C ends an answer, not the conversation."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  line editing and history for input()

    print("Type a message, /image FILE to show an image, /help for more, Ctrl-D to leave.")
    going = True
    while going:
        try:
            going = chat.take(input("> "))
        except EOFError:
            print()
            going = False
        except KeyboardInterrupt:
            print()
        except Idefics2Error as error:
            print(f"error: {error}", file=sys.stderr)


@dataclass
class _Chat:
    """A conversation so far, and the images that wait for the next message."""

    llm: "LLM"
    params: "SamplingParams"
    args: argparse.Namespace  # the rules for images
    images: "list[Image]" = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False once it is time to leave."""
        if not line.startswith("/"):
            if line.strip():
                self._answer(line.strip())
            return True
        command, _, rest = line.partition(" ")
        match command:
            case "/image":
                name = rest.strip().strip("'\"")  # a file dropped on a terminal comes in quotes
                self.images.append(options.read_image(name, self.args))
            case "/reset":
                self.messages.clear()
                self.images.clear()
            case "/help":
                print(_HELP)
            case "/quit":
                return False
            case _:
                raise PromptError(f"no command {command!r}; /help lists them")
        return True

    def _answer(self, text: str) -> None:
        """Print the answer to ``text`` as it is made; what was said before Ctrl-C stays said."""
        images = [{"type": "image", "image": image} for image in self.images]
        question = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        said = ""
        try:
            with contextlib.closing(
                self.llm.stream([*self.messages, question], self.params)
            ) as outputs:
                for output in outputs:
                    print(output.outputs[0].text[len(said) :], end="", flush=True)
                    said = output.outputs[0].text
        except KeyboardInterrupt:
            self._remember(question, said)
            raise
        self._remember(question, said)
        print()

    def _remember(self, question: dict[str, Any], said: str) -> None:
        answer = {"role": "assistant", "content": [{"type": "text", "text": said.strip()}]}
        self.messages += [question, answer]
        self.images.clear()
