"""The inputs of a comparison: questions with images, by default about the demo's pictures."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import ConfigError
from idefics2_engine.images.loader import ImageSource, MediaConfig
from idefics2_engine.prompts.messages import read_messages
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor
from idefics2_engine.prompts.tokenizer import IMAGE


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt with its images.

    Attributes:
        images: Sources of the images, in the order of their placeholders.
        text: A raw prompt with ``<image>`` for each image. ``None`` for a conversation.
        turns: Messages whose image parts have no source. ``None`` for a raw prompt.
        split: Whether each image is split. If ``None``, the checkpoint decides.
        longest_edge: Pixels to which images are scaled down. If ``None``, the checkpoint decides.
    """

    images: tuple[ImageSource, ...]
    text: str | None = None
    turns: tuple[Mapping[str, Any], ...] | None = None
    split: bool | None = None
    longest_edge: int | None = None

    @classmethod
    def question(
        cls, text: str, images: Sequence[ImageSource] = (), split: bool | None = None
    ) -> "Case":
        """Return a conversation of one question about ``images``."""
        parts = [{"type": "image"} for _ in images]
        content = [*parts, {"type": "text", "text": text}]
        return cls(tuple(images), turns=({"role": "user", "content": content},), split=split)

    @classmethod
    def raw(
        cls, text: str, images: Sequence[ImageSource] = (), split: bool | None = None
    ) -> "Case":
        """Return a prompt that is continued as it is."""
        return cls(tuple(images), text=text, split=split)

    @classmethod
    def of_prompt(cls, prompt: Any, split: bool | None = None) -> "Case":
        """Return the case of a prompt or a conversation as ``LLM.iterate`` takes it.

        Raises:
            ConfigError: It is a prompt of token ids.
            PromptError: It is malformed.
        """
        if isinstance(prompt, str):
            return cls.raw(prompt, split=split)
        if not isinstance(prompt, Mapping):
            turns, sources = read_messages(prompt)
            return cls(tuple(sources), turns=tuple(turns), split=split)
        if "prompt" not in prompt:
            raise ConfigError("a row must have a text to compare paths, got token ids")
        images = (prompt.get("multi_modal_data") or {}).get("image", [])
        several = images if isinstance(images, list | tuple) else [images]
        return cls.raw(prompt["prompt"], several, split)

    @property
    def asked(self) -> str:
        """The text of the prompt, or of the last message, without its images."""
        if self.turns is None:
            return " ".join((self.text or "").replace(IMAGE, " ").split())
        parts = self.turns[-1]["content"] if self.turns else ()
        return " ".join(" ".join(part.get("text", "") for part in parts).split())

    def process(self, processor: Processor) -> ProcessedPrompt:
        """Return token ids and tiles; raise ``PromptError`` or ``ImageError`` as ``processor``."""
        if self.turns is None:
            return processor.prompt(self.text or "", self.images)
        return processor.chat(self.turns, self.images)


def default_cases() -> list[Case]:
    """Return twelve cases about the demo's pictures, which reach every branch of the model.

    There are several images, with and without splitting, no image, pictures of odd sizes, a prompt
    that is longer than the demo's window, and a short one.
    """

    def picture(name: str) -> pathlib.Path:
        return DEMO_IMAGES / f"{name}.png"

    def odd(name: str, width: int, height: int) -> Any:
        from PIL import Image

        with Image.open(picture(name)) as image:
            return image.convert("RGB").crop((0, 0, width, height))

    shapes, sign, crowd = picture("shapes"), picture("sign"), picture("crowd")
    pair = [picture("before"), picture("after")]
    return [
        Case.question("How many shapes are there?", [shapes]),
        Case.question("Where is the star?", [shapes], split=False),
        Case.question("What word is written?", [sign]),
        Case.question("Describe the image.", [sign], split=False),
        Case.question("How many rings are there?", [crowd]),
        Case.question("What's the difference between these two images?", pair),
        Case.question("Which image has more shapes?", [shapes, sign, crowd]),
        Case.question("Is there a blue circle?", [odd("shapes", 301, 127)]),
        Case.question("What color is the heart?", [odd("shapes", 45, 203)], split=False),
        Case.question("Who are you?"),
        Case.raw("<image>The picture shows", [odd("crowd", 99, 100)], split=True),
        Case.raw("a"),
    ]


def row_cases(rows: pathlib.Path, split: bool | None = None) -> list[Case]:
    """Return the cases of a file of rows, as a job reads it.

    Raises:
        ConfigError: The file cannot be read, or a row is bad.
    """
    from idefics2_engine.jobs.readers.input_options import InputOptions
    from idefics2_engine.jobs.readers.job_input import JobInput
    from idefics2_engine.sampling_params import SamplingParams

    cases = []
    for row in JobInput(InputOptions(inputs=(str(rows),)), SamplingParams()).rows():
        if row.error is not None:
            raise ConfigError(f"{row.place}: {row.error.message}")
        cases.append(Case.of_prompt(row.prompt, split))
    if not cases:
        raise ConfigError(f"{rows}: must have at least one row, got none")
    return cases


class Processors:
    """Processors of one checkpoint, with and without splitting, for images of any longest edge."""

    def __init__(self, folder: pathlib.Path) -> None:
        from idefics2_engine.model.config import ModelConfig

        self.config = ModelConfig.load(folder)
        self._folder = folder
        self._loaded: dict[tuple[bool | None, int | None], Processor] = {}

    def of(self, case: Case) -> Processor:
        """Return the processor for ``case``.

        Raises:
            ConfigError: The case's longest edge is below the checkpoint's shortest edge.
        """
        key = case.split, case.longest_edge
        if key not in self._loaded:
            processor = Processor.load(self._folder, self.config, case.split, MediaConfig())
            self._loaded[key] = _scaling_to(processor, case.longest_edge)
        return self._loaded[key]


def _scaling_to(processor: Processor, longest_edge: int | None) -> Processor:
    if longest_edge is None:
        return processor
    config = processor.image_config
    if longest_edge < config.shortest_edge:
        raise ConfigError(
            f"longest_edge must be at least the shortest edge {config.shortest_edge}, "
            f"got {longest_edge}"
        )
    return replace(processor, image_config=replace(config, longest_edge=longest_edge))
