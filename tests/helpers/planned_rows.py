"""Rows of jobs and planners of them, for tests of plans."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.plan.row_planner import RowPlanner
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams


def job_rows(prompts: Iterable[Any], params: SamplingParams | None = None) -> list[JobRow]:
    """Return a row for each prompt."""
    return [
        JobRow(
            index=number,
            number=number,
            id=f"row-{number}",
            key="",
            place=f"in.jsonl: line {number + 1}",
            prompt=prompt,
            sampling_params=params,
        )
        for number, prompt in enumerate(prompts)
    ]


def question(text: str, *images: Any) -> list[dict[str, Any]]:
    """Return a conversation of one turn."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def planner(
    folder: Path,
    media: MediaConfig,
    *,
    split: bool | None = None,
    max_model_len: int | None = None,
    defaults: SamplingParams | None = None,
    check: ImageCheck = ImageCheck.HEADER,
) -> RowPlanner:
    """Return a planner for the checkpoint in ``folder``."""
    config = ModelConfig.load(folder)
    processor = Processor.load(folder, config, split, media)
    return RowPlanner(
        processor,
        config,
        GenerationConfig.of_checkpoint(folder, processor.tokenizer),
        max_model_len or config.text.max_positions,
        defaults=defaults or SamplingParams(),
        check=check,
    )
