"""Training with transformers' ``Trainer``: the losses and weights that it has with transformers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_models import MIXED, batch, build_own, build_peer
from idefics2_engine.hf import accelerate_model


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows of ``MIXED``, with the labels of the documentation."""

    def __init__(self) -> None:
        self._inputs = batch(MIXED)
        ids = self._inputs["input_ids"]
        self._inputs["labels"] = ids.masked_fill(self._inputs["attention_mask"] == 0, -100)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self._inputs.items()}


def train(model: Any, folder: Path, **settings: Any) -> list[float]:
    """Train four steps on a CPU, and return the losses of all steps and of the evaluation."""
    arguments: Any = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        prediction_loss_only=True,
        **settings,
    )
    trainer: Any = transformers.Trainer(
        model=model, args=arguments, train_dataset=Samples(), eval_dataset=Samples()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "checkpointing", "accumulation"],
)
def test_four_steps_equal_transformers(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer = build_peer(MIXED)
    own = accelerate_model(build_own(peer, MIXED))
    wanted = train(peer, tmp_path, **settings)
    with caplog.at_level(logging.WARNING, "idefics2_engine.hf"):
        got = train(own, tmp_path, **settings)
    assert len(got) == 5
    assert wanted[-1] < wanted[0] - 0.1
    assert got == pytest.approx(wanted, rel=1e-5)
    assert not [r.message for r in caplog.records if r.name.startswith("idefics2_engine.")]
