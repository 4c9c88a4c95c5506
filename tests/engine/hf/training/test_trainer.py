"""Training with transformers' ``Trainer``: the losses and weights that it has with transformers."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_models import MIXED, batch, build_own, build_peer, counted, counted_gradients
from idefics2_engine.hf import accelerate_model
from idefics2_kernels import REFERENCE


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


def train(model: Any, folder: Path, resume: str | None = None, **settings: Any) -> list[float]:
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
        disable_tqdm=True,
        prediction_loss_only=True,
        **({"save_strategy": "no"} | settings),
    )
    trainer: Any = transformers.Trainer(
        model=model, args=arguments, train_dataset=Samples(), eval_dataset=Samples()
    )
    trainer.train(resume_from_checkpoint=resume)
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


def test_autocast_of_trainer_runs_the_operations(tmp_path: Path) -> None:
    # A trainer with bf16=True runs the model under autocast, and 16-bit weights need none
    peer = build_peer(MIXED, torch.bfloat16)
    calls: Counter[str] = Counter()
    own = accelerate_model(
        build_own(peer, MIXED), counted(REFERENCE, calls), counted_gradients(calls)
    )
    got = train(own, tmp_path, bf16=True)
    assert got == pytest.approx(train(peer, tmp_path, bf16=True), rel=0.02)
    assert calls["linear_cross_entropy backward"] == 4
    assert calls["flash_attention backward"] == 4 * 5


def test_resume_gives_the_same_weights(tmp_path: Path) -> None:
    peer = build_peer(MIXED)
    whole, resumed = (accelerate_model(build_own(peer, MIXED)) for _ in range(2))
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    train(whole, tmp_path, **settings)
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
