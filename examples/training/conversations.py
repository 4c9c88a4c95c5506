"""Conversations about scenes as a model sees them: token ids, an answer mask, and pixels of tiles.

The ids are those of ``Processor.chat`` and the tiles are those of ``make_tiles``, which inference
uses as well.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from idefics2_engine.errors import ConfigError
from idefics2_engine.images.tiling import Tile, make_tiles
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.prompts.tokenizer import END_OF_UTTERANCE, expand_placeholders
from questions import Conversation
from scenes import Scene, render

# Rows and columns of patches
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Conversations as ids. ``answers`` is true for the assistant's tokens and their end token."""

    ids: npt.NDArray[np.int16]  # (..., tokens)
    answers: npt.NDArray[np.bool_]  # (..., tokens)


class Preparer:
    """An encoder of conversations and scenes for one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.config = ModelConfig.load(folder)
        processor = Processor.load(folder, self.config, split=True)
        if processor.template is None:
            raise ConfigError(f"{folder}: must have a chat template to train on, got none")
        self.image_config = processor.image_config
        self._template, self._tokenizer = processor.template, processor.tokenizer
        self._image = self._tokenizer.image_id
        tile = [self._image] * processor.image_seq_len
        quarter = [*tile, self._tokenizer.fake_image_id]
        quarters = quarter * (self.image_config.tiles_per_image - 1)
        self._slots = {
            split: np.array(quarters + tile if split else tile, dtype=np.int16)
            for split in (True, False)
        }
        self._end, *role = self._tokenizer.encode(f"{END_OF_UTTERANCE}\nAssistant:", add_bos=False)
        self._role_tokens = len(role)

    def tokens(self, conversation: Conversation) -> Tokens:
        """Encode a whole conversation with one image token for each image."""
        turns = messages(conversation)
        for turn in turns[1::2]:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        marked = self._template.render(turns, add_generation_prompt=False)
        expanded = expand_placeholders(marked, image_seq_len=1, tiles_per_image=1)
        ids = np.array(self._tokenizer.encode_marked(expanded), dtype=np.int16)
        ends = np.flatnonzero(ids == self._end).tolist()
        answers = np.zeros(len(ids), dtype=np.bool_)
        for asked, said in zip(ends[::2], ends[1::2], strict=True):
            answers[asked + 1 + self._role_tokens : said + 1] = True
        return Tokens(ids, answers)

    def added(self, num_images: int, split: bool) -> int:
        """Return how many tokens ``expanded`` adds to a conversation."""
        return num_images * (len(self._slots[split]) - 1)

    def expanded(self, tokens: Tokens, split: bool) -> Tokens:
        """Expand each image token to the tokens of one tile, or of five with their separators.

        Args:
            tokens: One conversation (tokens,), or several (N, tokens) with equally many images.
            split: Whether the images are split.
        """
        slots = self._slots[split]
        is_image = (tokens.ids == self._image).ravel()
        repeats = np.where(is_image, len(slots), 1)
        ids = tokens.ids.ravel().repeat(repeats)
        ids[is_image.repeat(repeats)] = np.tile(slots, is_image.sum())
        answers = tokens.answers.ravel().repeat(repeats)
        rows = tokens.ids.shape[:-1]
        return Tokens(ids.reshape(*rows, -1), answers.reshape(*rows, -1))

    def tiles(self, scene: Scene) -> list[Tile]:
        """Draw ``scene``, split it into tiles and resize them: four quarters, then the whole."""
        vision = self.config.vision
        return make_tiles(render(scene), self.image_config, vision.patch_size, vision.grid)


def messages(conversation: Conversation, answers: list[str] | None = None) -> list[dict[str, Any]]:
    """Return a conversation as chat messages, whose first has an image part for each image.

    Args:
        conversation: The conversation, with its questions and right answers.
        answers: The answers to the first turns. The messages end with the next question. If
            ``None``, all turns are returned with their right answers.
    """
    turns = conversation.turns
    if answers is not None:
        asked = turns[: len(answers) + 1]
        turns = tuple((q, a) for (q, _), a in zip(asked, [*answers, ""], strict=True))
    written: list[dict[str, Any]] = []
    for question, answer in turns:
        written.append({"role": "user", "content": [{"type": "text", "text": question}]})
        written.append({"role": "assistant", "content": answer})
    images = [{"type": "image"} for _ in range(conversation.num_images)]
    text = written[0]["content"]
    written[0]["content"] = [*text, *images] if conversation.text_first else [*images, *text]
    return written if answers is None else written[:-1]


def held_out_seed(kind: str, place: int) -> str:
    """Return the seed's name of a held-out question; training and its reports use other names."""
    return f"held-out {kind} {place}"
