"""Forward passes: a prompt, and images from padded pixels to embeddings."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from idefics2_bench.hf.cases import PREFILL, Sizes
from idefics2_bench.hf.models import Models
from idefics2_bench.timing import alternate
from idefics2_bench.workloads import Counts
from idefics2_engine.jobs.plan.device_rates import PEER

Row = dict[str, Any]
Forward = Callable[[Any], Tensor]


def forward_rows(case: str, models: Models, sizes: Sizes, impl: str, rounds: int) -> list[Row]:
    """Check and time a forward pass of both classes; ``impl`` is the name of ours.

    A result that is not finite has no time in its row.
    """
    forward, counts = _prompt(models, sizes) if case == PREFILL else _images(case, models, sizes)
    classes = {impl: models.own, PEER: models.peer}
    # This also compiles what is not compiled yet
    firsts = {name: forward(model).float() for name, model in classes.items()}
    calls = {
        name: lambda model=classes[name]: forward(model)
        for name, first in firsts.items()
        if first.isfinite().all()
    }
    times = alternate(calls, rounds, 0, models.device)
    rows: list[Row] = [{"impl": name, **asdict(counts)} for name in classes]
    for row in rows:
        if (time := times.get(row["impl"])) is not None:
            row |= {**asdict(time), **counts.rates(time.ms / 1e3)}
    if len(times) == len(classes):
        ours, theirs = (times[name].ms for name in classes)
        found, wanted = firsts.values()
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        rows[0] |= {"peer": PEER, "peer_ms": theirs, "speedup": theirs / ours}
        rows[0]["peer_difference"] = difference
    return rows


def _prompt(models: Models, sizes: Sizes) -> tuple[Forward, Counts]:
    ids = models.prompts(sizes.prefill)

    def logits(model: Any) -> Tensor:
        found: Tensor = model(input_ids=ids, logits_to_keep=1).logits
        return found

    return logits, Counts(text_tokens=ids.numel(), new_tokens=1)


def _images(case: str, models: Models, sizes: Sizes) -> tuple[Forward, Counts]:
    config = models.packed.config
    side = config.vision.patch_size
    images = sizes.images(case, side)
    inputs = _padded(images, models)

    def embeddings(model: Any) -> Tensor:
        found = model.get_image_features(**inputs).pooler_output
        # One tensor for all images, or one for each
        return found if isinstance(found, Tensor) else torch.cat(list(found))

    counts = Counts(
        images=len(images),
        patches=sum((height // side) * (width // side) for height, width in images),
        image_tokens=len(images) * config.perceiver.num_latents,
    )
    return embeddings, counts


def _padded(sizes: list[tuple[int, int]], models: Models) -> dict[str, Tensor]:
    """Draw images of ``sizes`` as one row, padded to the largest height and width."""
    generator = torch.Generator().manual_seed(0)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    values = torch.zeros(1, len(sizes), 3, height, width)
    mask = torch.zeros(1, len(sizes), height, width, dtype=torch.int64)
    for i, (h, w) in enumerate(sizes):
        values[0, i, :, :h, :w] = torch.rand(3, h, w, generator=generator) * 2 - 1
        mask[0, i, :h, :w] = 1
    return {
        "pixel_values": values.to(models.device, models.packed.dtype),
        "pixel_attention_mask": mask.to(models.device),
    }
