"""``idefics2 chat``: a conversation in the terminal, or over a pipe with one message per line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import options, streams
from idefics2_engine.cli.interrupts import KeptInterrupts
from idefics2_engine.cli.log_output import add_log_options
from idefics2_engine.errors import Idefics2Error, ImageError, PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

    from idefics2_engine import LLM, SamplingParams
    from idefics2_engine.outputs import RequestOutput

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
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends and return the exit code."""
    params = options.sampling_params(args)
    if "-" in args.images:
        raise ImageError("image: must be a file, as standard input is the conversation's, got '-'")
    images = [options.read_image(name, args) for name in args.images]
    with options.loaded_llm(args) as llm:
        chat = Chat(llm, params, args, images)
        if streams.are_terminals():
            with chat.interrupts:
                talk(chat)
        else:
            for line in streams.input_lines():
                if not chat.take(line):
                    break
    return 0


def talk(chat: "Chat") -> None:
    """Prompt for messages; an error or Ctrl-C ends an answer, not the conversation."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  line editing and history for input()

    print("Type a message, /image FILE to show an image, /help for more, Ctrl-D to leave.")
    going = True
    while going:
        try:
            with chat.interrupts.raised():
                line = input("> ")
            going = chat.take(line)
        except EOFError:
            print()
            going = False
        except KeyboardInterrupt:
            print()
        except Idefics2Error as error:
            print(f"error: {error}", file=sys.stderr)


@dataclass
class Chat:
    """A conversation so far, and the images that wait for the next message."""

    llm: "LLM"
    params: "SamplingParams"
    args: argparse.Namespace  # the rules for images
    images: "list[Image]" = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    interrupts: KeptInterrupts = field(default_factory=KeptInterrupts)

    def take(self, line: str) -> bool:
        """Execute a command or answer a message; return whether the conversation continues."""
        if not line.startswith("/"):
            if line.strip():
                self._answer(line.strip())
            return True
        command, _, rest = line.partition(" ")
        match command:
            case "/image":
                name = rest.strip().strip("'\"")  # a file dropped on a terminal comes in quotes
                with self.interrupts.raised():
                    image = options.read_image(name, self.args)
                self.images.append(image)
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
        """Print the answer to ``text`` as it is made.

        What was said before Ctrl-C stays said; a question that Ctrl-C or an error left without a
        word was not asked.
        """
        images = [{"type": "image", "image": image} for image in self.images]
        question = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        said = ""
        try:
            with self.interrupts.raised():  # it reads the images
                outputs = self.llm.stream([*self.messages, question], self.params)
            with contextlib.closing(outputs):
                while output := self._next(outputs):
                    print(output.outputs[0].text[len(said) :], end="", flush=True)
                    said = output.outputs[0].text
        except KeyboardInterrupt:
            if said.strip():
                self._remember(question, said)
            raise
        except Idefics2Error:
            if said:
                print()
            raise
        self._remember(question, said)
        print()

    def _next(self, outputs: "Iterator[RequestOutput]") -> "RequestOutput | None":
        """Return the next of ``outputs``; Ctrl-C ends the answer here and nowhere else."""
        with self.interrupts.raised():
            return next(outputs, None)

    def _remember(self, question: dict[str, Any], said: str) -> None:
        answer = {"role": "assistant", "content": [{"type": "text", "text": said.strip()}]}
        self.messages += [question, answer]
        self.images.clear()
