"""The state of the training loop: model, optimizers, schedule, and the computation of a step."""

import argparse
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import IGNORED_LABEL, Idefics2
from initial_weights import init_for_training
from muon import Muon
from questions import ALL_KINDS
from step_graphs import Step, StepGraphs
from training_data import Batch, EqualTiles
from training_ops import TRAINING

_WARM_UP_STEPS = 300
# Final learning rate as a share of the highest
_LAST_RATE = 0.01
_BETAS = (0.9, 0.98)
# Weight decay of matrices
_WEIGHT_DECAY = 0.02
_LARGEST_GRADIENT = 1.0
# Images are not split before this share of the schedule
_WHOLE_UNTIL = 0.4
# Later, one step in this many is on whole images
_WHOLE_EVERY = 8


@dataclass
class Trainer:
    """The model, the optimizers, and the progress of training.

    On a GPU the model computes in bfloat16. The optimizers work on ``masters``, its parameters in
    fp32.
    """

    model: Idefics2
    # One for each parameter, in order
    masters: list[Tensor]
    optimizers: tuple[Muon, torch.optim.AdamW]
    # The optimizers' learning rates, as tensors so that a captured step reads the current ones
    rates: tuple[Tensor, Tensor]
    peak_rates: tuple[float, float]
    # The schedule's length, unless it is limited by time
    steps: int | None
    # The schedule's time limit
    seconds: float | None
    step: int = 0
    # Seconds of training so far
    elapsed: float = 0.0

    def __post_init__(self) -> None:
        """Allocate the gradients; steps run from CUDA graphs if there is CUDA."""
        device = self.model.device
        self._gradient = torch.zeros(sum(p.numel() for p in self.masters), device=device)
        parts = self._gradient.split([p.numel() for p in self.masters])
        for master, part in zip(self.masters, parts, strict=True):
            master.grad = part.view(master.shape)
        self._take_step: Step = StepGraphs(self._update) if device.type == "cuda" else self._update

    @classmethod
    def new(cls, options: argparse.Namespace, device: torch.device) -> "Trainer":
        """Start from random weights, or from those of ``--init``."""
        if options.init is None:
            model = Idefics2(ModelConfig.load(options.base), TRAINING, device)
            init_for_training(model, options.seed)
        else:
            model = load_checkpoint(options.init, TRAINING, device, torch.float32)
        masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        if device.type == "cuda":
            model = model.to(torch.bfloat16)
        products = {name for name in masters if name.endswith("proj.weight") or ".mlp.fc" in name}
        products = {name for name in products if masters[name].ndim > 1}
        rates = torch.zeros((), device=device), torch.zeros((), device=device)
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in masters.items() if name not in products and p.ndim > 1]},
            {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        on_gpu = device.type == "cuda"
        optimizers = (
            Muon([masters[name] for name in sorted(products)], rates[0], _WEIGHT_DECAY),
            torch.optim.AdamW(
                groups,
                rates[1],
                _BETAS,
                weight_decay=_WEIGHT_DECAY,
                fused=on_gpu,
                capturable=on_gpu,
            ),
        )
        peak_rates = options.matrix_rate, options.rate
        return cls(
            model, list(masters.values()), optimizers, rates, peak_rates, options.steps, None
        )

    @property
    def progress(self) -> float:
        """Return the share of the schedule that is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        assert self.seconds is not None
        return min(1.0, self.elapsed / self.seconds)

    @property
    def finished(self) -> bool:
        """Return whether the schedule has ended."""
        return self.progress >= 1.0

    @property
    def rate(self) -> float:
        """Return the learning rate of the next step, as a share of the highest."""
        warm_up = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return warm_up * (_LAST_RATE + (1 - _LAST_RATE) * cosine)

    def choose(self, size: int) -> tuple[int, bool]:
        """Return the next batch's number of conversations, and whether its images are split.

        A batch of split images has ``size`` conversations. At first no image is split, so that the
        model learns to see from a fifth of the tiles. Later a few batches stay whole, so that it
        does not forget them.
        """
        split = self.progress >= _WHOLE_UNTIL and self.step % _WHOLE_EVERY != 0
        return (size, True) if split else (2 * size, False)

    def train(self, batch: Batch) -> Tensor:
        """Take one step; return the loss, still on the device."""
        for rate, peak in zip(self.rates, self.peak_rates, strict=True):
            rate.fill_(peak * self.rate)
        loss = self._take_step(batch)
        self.step += 1
        return loss

    def _update(self, batch: Batch) -> Tensor:
        """Run the part of a step that happens on the device."""
        loss = self.model.loss(batch.text, batch.labels, image_features(self.model, batch))
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(_gradients(self.masters), _gradients(self.model.parameters()))
            self.clip_gradients()
            for optimizer in self.optimizers:
                optimizer.step()
            self._copy_masters()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def clip_gradients(self) -> None:
        """Clip a gradient to its largest norm; one that is not finite becomes zero."""
        norm = self._gradient.norm()
        self._gradient.nan_to_num_(0.0, 0.0, 0.0)
        share = (_LARGEST_GRADIENT / (norm + 1e-6)).clamp(max=1.0)
        self._gradient.mul_(torch.where(norm.isfinite(), share, 0.0))

    def _copy_masters(self) -> None:
        torch._foreach_copy_(list(self.model.parameters()), self.masters)

    @torch.no_grad()
    def exact_match(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the share of conversations of each kind with every answer token right.

        A token is right if it is the most likely one after the right tokens before it. All tokens
        are right exactly if greedy decoding gives the answer.
        """
        right: dict[str, list[bool]] = {}
        for batch in batches:
            logits = self.model(batch.text, image_features(self.model, batch))
            guesses = logits.argmax(-1).view(len(batch.kinds), -1)[:, :-1]
            labels = batch.labels.view(len(batch.kinds), -1)[:, 1:]
            correct = ((guesses == labels) | (labels == IGNORED_LABEL)).all(-1)
            for kind, ok in zip(batch.kinds.tolist(), correct.tolist(), strict=True):
                right.setdefault(ALL_KINDS[kind], []).append(ok)
        return {kind: sum(oks) / len(oks) for kind, oks in sorted(right.items())}

    def save(self, path: Path) -> None:
        """Write the state that a resumed run needs, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        state = {
            "masters": self.masters,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps": self.steps,
            "seconds": self.seconds,
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Restore the state that ``save`` wrote; a new ``--steps`` replaces the schedule's end."""
        state: dict[str, Any] = torch.load(path, map_location=self.model.device, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            self._copy_masters()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.step, self.elapsed = state["step"], state["elapsed"]
        if self.steps is None:
            self.steps, self.seconds = state["steps"], state["seconds"]

    def export(self, base: Path, out: Path) -> None:
        """Write the checkpoint: the JSON files of ``base`` and the weights in bfloat16."""
        save_checkpoint(self.model, out, dtype=torch.bfloat16, config_from=base)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def image_features(model: Idefics2, batch: Batch) -> Tensor:
    """Encode a batch's tiles: (B * images, tiles, latents, hidden)."""
    return torch.cat([_encoded(model, tiles) for tiles in batch.tiles], dim=1)


def _encoded(model: Idefics2, tiles: EqualTiles) -> Tensor:
    """Encode N x K tiles of one grid: (N, K, latents, hidden).

    It computes the same as ``Idefics2.image_features``, but cuts the patches of all tiles at once.
    """
    rows, columns = tiles.grid
    side = model.config.vision.patch_size
    N, K = tiles.pixels.shape[:2]
    cut = tiles.pixels.reshape(N * K, rows, side, columns, side, 3).permute(0, 1, 3, 5, 2, 4)
    patches = ((cut.reshape(-1, 3 * side**2).float() / 255 - 0.5) / 0.5).to(model.dtype)
    encoded = model.encode(patches, tiles.position_ids, tiles.cu_seqlens, rows * columns)
    return encoded.view(N, K, *encoded.shape[1:])
