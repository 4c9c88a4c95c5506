"""``Trainer`` stops at gradients that are not finite, and says which."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from idefics2_engine.hf import FiniteGradients


class Model(nn.Module):
    """Two layers, of which the gradient of the first is broken in one step."""

    def __init__(self, bad: float, bad_step: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.bad, self.bad_step, self.step = bad, bad_step, 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        inner = self.first(x + self.frozen)
        self.step += 1
        if self.step == self.bad_step:
            inner.register_hook(lambda gradient: gradient * self.bad)
        return {"loss": (self.second(inner) - labels).square().mean()}


def train(model: Model, folder: Path, **settings: Any) -> None:
    rows = [{"x": torch.full((3,), float(i)), "labels": torch.ones(1)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    data: Any = rows
    trainer: Any = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[FiniteGradients()]
    )
    trainer.train()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_the_first_tensor_is_named(bad: float, accumulation: int, tmp_path: Path) -> None:
    model = Model(bad, bad_step=3)
    message = (
        rf"^gradients must be finite, got one of first\.(weight|bias) in step "
        rf"{(3 + accumulation - 1) // accumulation} that is not, the first of 2 from the loss "
    )
    with pytest.raises(FloatingPointError, match=message):
        train(model, tmp_path, gradient_accumulation_steps=accumulation)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_finite_gradients_train_on(tmp_path: Path) -> None:
    model = Model(float("nan"), bad_step=5)
    train(model, tmp_path)
    assert model.step == 4
    # The hooks are gone
    model(torch.ones(1, 3), torch.ones(1))["loss"].backward()
    assert model.first.weight.grad is not None
    assert model.first.weight.grad.isnan().any()
