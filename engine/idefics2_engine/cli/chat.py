"""The command ``idefics2 chat``, a conversation in a terminal, or over a pipe, a message a line."""

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
        description="Talk about images in the terminal. From a pipe each line is a message, only "
        "the\nanswers are printed, and the first error ends it.",
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
    """Hold the conversation until it ends and return the exit code.

    Raises:
        Idefics2Error: An option or an image is invalid, or a message that does not come from a
            terminal failed.
    """
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
    """Prompt for messages until the user leaves.

    An error or Ctrl-C ends an answer, but not the conversation.
    """
    # readline adds line editing and history to input(), but some platforms lack it
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

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
    """A conversation, and the images that wait for its next message."""

    llm: "LLM"
    params: "SamplingParams"
    # Contains the rules for images
    args: argparse.Namespace
    images: "list[Image]" = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    interrupts: KeptInterrupts = field(default_factory=KeptInterrupts)

    def take(self, line: str) -> bool:
        """Execute a command or answer a message; return whether the conversation continues.

        Raises:
            Idefics2Error: The command is unknown, or an image or the message failed.
            KeyboardInterrupt: Ctrl-C ended it.
        """
        if not line.startswith("/"):
            if line.strip():
                self._answer(line.strip())
            return True
        command, _, rest = line.partition(" ")
        match command:
            case "/image":
                # Terminals quote the name of a file that is dropped on them
                name = rest.strip().strip("'\"")
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
        """Print the answer to ``text`` while it is generated, and add both to the conversation.

        After Ctrl-C the part of the answer that was printed is added. If no word was printed, or
        after an error, nothing is added, and the images wait for the next message.
        """
        images = [{"type": "image", "image": image} for image in self.images]
        question = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        said = ""
        try:
            # The call reads the images, which may take long
            with self.interrupts.raised():
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
        """Return the next output, or ``None`` at the end; only here Ctrl-C can end the answer."""
        with self.interrupts.raised():
            return next(outputs, None)

    def _remember(self, question: dict[str, Any], said: str) -> None:
        answer = {"role": "assistant", "content": [{"type": "text", "text": said.strip()}]}
        self.messages += [question, answer]
        self.images.clear()
