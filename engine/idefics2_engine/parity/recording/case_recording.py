"""What one path computed for one case."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.images.tiling import QUARTERS
from idefics2_engine.parity import stages

_PARTS_OF_IMAGE = ("top left", "top right", "bottom left", "bottom right", "whole")


@dataclass
class CaseRecording:
    """The stages of one case.

    Attributes:
        prompt_ids: Token ids of the prompt.
        answer_ids: Tokens of the greedy answer.
        text: The answer.
        token_texts: Text of each token of prompt and answer.
        grids: Rows and columns of patches of each tile.
        tiles_per_image: Tiles of each image.
        question: What was asked, empty if it is not known.
        stages: Parts of each stage, matrices.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    text: str
    token_texts: list[str]
    grids: list[tuple[int, int]]
    tiles_per_image: int
    question: str = ""
    stages: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        """Tokens of prompt and answer."""
        return self.prompt_ids + self.answer_ids

    def describe(self) -> dict[str, Any]:
        """Return all but the stages as JSON data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del values["stages"]
        return values

    def place(self, stage: str, part: int, row: int) -> dict[str, Any]:
        """Return what a row of a stage is: an image and its patch, or a token and its text."""
        unit = stages.unit(stage)
        if unit == "token":
            token = row + part * len(self.prompt_ids)
            text = self.token_texts[token] if token < len(self.token_texts) else ""
            return {"token": token, "token_text": text}
        if stage == stages.DECODE:
            return {"image": part, "pixel_row": row}
        image, tile = divmod(part, self.tiles_per_image)
        where: dict[str, Any] = {"image": image}
        if self.tiles_per_image == QUARTERS + 1:
            where["part"] = _PARTS_OF_IMAGE[tile]
        if unit == "pixels":
            return where | {"pixel_row": row}
        if unit == "latent":
            return where | {"latent": row}
        return where | {"patch": list(divmod(row, self.grids[part][1]))}


def pixel_matrix(pixels: npt.NDArray[Any]) -> Tensor:
    """Return an image (H, W, C) as a matrix (H, W * C) of its own."""
    return torch.from_numpy(np.array(pixels).reshape(pixels.shape[0], -1))


def id_matrix(ids: list[int]) -> Tensor:
    """Return token ids as a column."""
    return torch.tensor(ids, dtype=torch.int64).reshape(-1, 1)


def token_parts(rows: Tensor, prompt_length: int, answer_length: int) -> list[Tensor]:
    """Split the rows of tokens (T, …) in those of the prompt and those of the answer.

    The last token of an answer is not computed. Rows beyond it are left out.
    """
    rows = rows.reshape(-1, rows.shape[-1])[: prompt_length + max(answer_length - 1, 0)]
    return [rows[:prompt_length], rows[prompt_length:]]
