"""Training the demo checkpoint: the inputs of inference, and exact continuation of stopped runs."""

import json
import random
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_demo
from chunks import ChunkBuilder
from conversations import Preparer, messages
from data_workers import DataWorkers, training_jobs
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.model.batch import ImageBatch, TextBatch
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.prompts.processor import Processor
from idefics2_kernels import REFERENCE
from initial_weights import init_for_training
from muon import Muon
from paths import EXAMPLES
from questions import ALL_KINDS, KINDS, PAIR_KINDS, Conversation, example, question_of_kind
from rounds import Rounds
from scenes import random_scene, render
from trainer import Trainer, image_features
from training_data import Batch, DataSet
from training_ops import TRAINING

DEMO = EXAMPLES / "demo"


def test_training_ids_equal_chat_ids() -> None:
    preparer = Preparer(DEMO)
    asked = [question_of_kind(kind, f"ids {kind}")[1] for kind in ("word", "two_turn", *PAIR_KINDS)]
    asked += [c for place in range(8) for c in example(f"ids {place}").conversations]
    assert {"talk", *PAIR_KINDS} <= {conversation.kind for conversation in asked}
    assert any(conversation.text_first for conversation in asked)
    for split in (True, False):
        processor = Processor.load(DEMO, preparer.config, split=split)
        decode = processor.tokenizer.decode
        for conversation in asked:
            tokens = preparer.expanded(preparer.tokens(conversation), split)
            images = [Image.new("RGB", (40, 30))] * conversation.num_images
            answers = [answer for _, answer in conversation.turns]
            marked = np.zeros(len(tokens.ids), dtype=bool)
            for turn, answer in enumerate(answers):
                prompt = processor.chat(messages(conversation, answers[:turn]), images).token_ids
                assert tokens.ids[: len(prompt)].tolist() == prompt
                end = len(prompt) + tokens.ids[len(prompt) :].tolist().index(
                    processor.tokenizer.end_of_utterance_id
                )
                assert decode(tokens.ids[len(prompt) : end].tolist()).strip() == answer
                marked[len(prompt) : end + 1] = True
            assert tokens.answers.tolist() == marked.tolist()


@cache
def draw_here() -> DataWorkers:
    return DataWorkers(DEMO, 0)


def make_round(number: int, drawing: DataWorkers | None = None) -> DataSet:
    chunks = (drawing or draw_here()).chunks(training_jobs(1, number, 4))
    return DataSet(chunks, ModelConfig.load(DEMO), torch.device("cpu"))


@pytest.fixture(scope="module")
def data() -> DataSet:
    return make_round(0)


def new_trainer(*arguments: str) -> Trainer:
    options = train_demo.parser().parse_args(["--out", "unused", "--device", "cpu", *arguments])
    return Trainer.new(options, torch.device("cpu"))


def test_training_batches_equal_the_processors() -> None:
    model = Idefics2(ModelConfig.load(DEMO), REFERENCE)
    init_for_training(model, seed=0)
    preparer = Preparer(DEMO)
    conversation = Conversation("talk", (("What is this?", "A thing."),))
    # In the first size the quarters and the whole have one grid, in the second they differ
    for size in ((300, 260), (130, 130)):
        scene = random_scene(random.Random("batch"), size)
        builder = ChunkBuilder(preparer)
        # This adds earlier rows of the same grids
        builder.add_scene(scene.with_items([]))
        builder.add(conversation, [builder.add_scene(scene)])
        room = np.zeros(400_000, dtype=np.uint8)
        data = DataSet([(builder.chunk(room), room)] * 2, model.config, torch.device("cpu"))
        for batch in data.in_order(1):
            split = batch.tiles[0].pixels.shape[1] > 1
            prompt = Processor.load(DEMO, model.config, split=split).chat(
                messages(conversation), [render(scene)], add_generation_prompt=False
            )
            with torch.no_grad():
                ours = image_features(model, batch).flatten(0, 1)
                theirs = model.image_features(ImageBatch.from_tiles(prompt.tiles))
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                full = model.loss(batch.text, batch.labels, ours)
                plain = TextBatch.from_ids([prompt.token_ids])
                labels = batch.labels[: len(prompt.token_ids)]
                torch.testing.assert_close(full, model.loss(plain, labels, theirs))


def test_rounds_do_not_depend_on_worker_processes() -> None:
    one = make_round(3)
    with closing(DataWorkers(DEMO, 2)) as workers:
        other = make_round(3, workers)
    assert [group.key for group in one.groups] == [group.key for group in other.groups]
    for a, b in zip(one.groups, other.groups, strict=True):
        assert np.array_equal(a.kinds, b.kinds)
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids", "answers", "scenes"))
    assert one.pixels.keys() == other.pixels.keys()
    assert all(torch.equal(one.pixels[grids], other.pixels[grids]) for grids in one.pixels)
    another = make_round(4)
    sums, other_sums = (
        {int(scene.sum()) for scenes in data.pixels.values() for scene in scenes}
        for data in (one, another)
    )
    assert not sums & other_sums


def test_small_round_spans_chunks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_round(0)
    monkeypatch.setattr("data_workers._CHUNK", 1)
    cut = make_round(0)
    for a, b in zip(whole.groups, cut.groups, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.scenes, b.scenes)
    assert all(torch.equal(whole.pixels[grids], cut.pixels[grids]) for grids in whole.pixels)


def test_each_step_has_its_round() -> None:
    made: list[int] = []

    def make(number: int) -> DataSet:
        if number == 5:
            raise OSError("no scenes")
        made.append(number)
        return DataSet([], ModelConfig.load(DEMO), torch.device("cpu"))

    with closing(Rounds(make, 3, torch.device("cpu"))) as rounds:
        second = rounds.at(7)
        assert rounds.at(8) is second
        assert rounds.at(9) is not second
        rounds.at(12)
        assert made == [2, 3, 4]
        with pytest.raises(OSError, match="no scenes"):
            rounds.at(15)


@pytest.mark.gpu
def test_rounds_are_complete_on_a_gpu_while_steps_are_queued() -> None:
    device = torch.device("cuda")
    wanted = [
        [p.long().sum().item() for p in make_round(number).pixels.values()] for number in range(4)
    ]

    def make(number: int) -> DataSet:
        chunks = draw_here().chunks(training_jobs(1, number, 4))
        return DataSet(chunks, ModelConfig.load(DEMO), device)

    busy = torch.ones(4096, 4096, device=device)
    sums = []
    with closing(Rounds(make, 1, device)) as rounds:
        for step in range(4):
            pixels = rounds.at(step).pixels
            # The product is still running when the next round but one is copied
            for _ in range(50):
                busy = (busy @ busy).clamp(max=1)
            sums.append([p.long().sum() for p in pixels.values()])
            del pixels
    assert [[total.item() for total in of_round] for of_round in sums] == wanted


@pytest.mark.long
def test_loss_falls(data: DataSet) -> None:
    trainer = new_trainer("--steps", "6", "--rate", "0.1", "--matrix-rate", "0.3")
    losses = [trainer.train(data.draw(0, step % 2, 2, False)).item() for step in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.finished


def test_muon_equals_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    rate = torch.tensor(0.0)
    optimizers = (
        Muon(ours, rate, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        rate.fill_(0.1 / (step + 1))
        optimizers[1].param_groups[0]["lr"] = 0.1 / (step + 1)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, starts, strict=True):
        moved = (other - start).norm()
        # torch's Muon multiplies in bfloat16, even on a CPU
        assert (one - other).norm() < 0.02 * moved


def test_gradients_that_are_not_finite_are_zeroed(data: DataSet) -> None:
    trainer = new_trainer("--steps", "6")
    with torch.no_grad():
        trainer.masters[0].grad[0] = torch.nan  # type: ignore[index]
        trainer.clip_gradients()
    assert not any(master.grad.any() for master in trainer.masters)  # type: ignore[union-attr]
    with torch.no_grad():
        for master in trainer.masters:
            master.grad.fill_(1.0)  # type: ignore[union-attr]
        trainer.clip_gradients()
    norms = [master.grad.norm().item() for master in trainer.masters]  # type: ignore[union-attr]
    assert abs(np.linalg.norm(norms) - 1.0) < 1e-3


def test_early_steps_use_unsplit_images() -> None:
    trainer = new_trainer("--steps", "100")
    chosen = []
    for trainer.step in range(100):
        chosen.append(trainer.choose(8))
    assert set(chosen[:40]) == {(16, False)}
    assert chosen[40:].count((8, True)) == 52
    assert chosen[40:].count((16, False)) == 8


@pytest.mark.long
def test_interrupted_run_continues_from_its_last_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str, *arguments: str) -> None:
        sizes = "--steps 3 --batch 1 --round-steps 2 --round-examples 2 --test-per-kind 1"
        command = (
            f"train --out {tmp_path / out} --device cpu --data-workers 0 --log-every 1 {sizes}"
        )
        monkeypatch.setattr("sys.argv", [*command.split(), *arguments])
        train_demo.main()

    def train(trainer: Trainer, batch: Batch) -> torch.Tensor:
        # The run stops after the first of each round's two steps, and leaves a state file
        monkeypatch.setattr("train_demo._SAVE_SECONDS", 0.0)
        if trainer.step == 1:
            raise KeyboardInterrupt
        return unbroken(trainer, batch)

    monkeypatch.setattr("train_demo._PRACTICE_BATCHES", 1)
    monkeypatch.setattr("train_demo._TEST_BATCH", 2)
    run("whole")
    printed = capsys.readouterr().out
    assert "step 3 exact, held-out" in printed
    assert "step 3 exact, training" in printed
    assert "finished; wrote" in printed
    report = json.loads((tmp_path / "whole/training.json").read_text())
    assert set(report["exact_match"]["held-out"]) == set(KINDS)
    unbroken = Trainer.train
    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.setattr(Trainer, "train", unbroken)
    monkeypatch.setattr("train_demo._SAVE_SECONDS", 1e9)
    run("broken", "--resume")
    assert "resumed at step 1" in capsys.readouterr().out
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_training_operations_equal_the_reference(data: DataSet) -> None:
    results = []
    for ops in (REFERENCE, TRAINING):
        model = Idefics2(ModelConfig.load(DEMO), ops)
        init_for_training(model, seed=0)
        # The longest group, of two images, exceeds the window. The other one has one whole image.
        keys = [group.key for group in data.groups]
        longest = data.groups[max(range(len(keys)), key=lambda place: keys[place].length)]
        assert longest.key.length > 192
        whole = next(group for group in data.groups if not group.key.split)
        values = []
        for group in (longest, whole):
            batch = data.batch(group, np.array([0, len(group.ids) - 1]))
            loss = model.loss(batch.text, batch.labels, image_features(model, batch))
            loss.backward()
            values.append(loss.detach())
        results.append((values, {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), (fused_losses, fused_gradients) = results
    torch.testing.assert_close(fused_losses, losses, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert gradient is not None
        fused = fused_gradients[name]
        assert fused is not None
        assert (fused - gradient).norm() <= 1e-4 * gradient.norm(), name
        assert gradient.norm() > 0, name


def test_unequal_lengths_are_refused() -> None:
    q = torch.ones(5, 2, 4)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="equal length 3, got 5"):
        TRAINING.flash_attention(q, q, q, offsets, 3, causal=True)


def test_training_starts_at_unit_scale(data: DataSet) -> None:
    model = Idefics2(ModelConfig.load(DEMO), TRAINING)
    init_for_training(model, seed=0)
    scales: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(module: object, inputs: object, output: torch.Tensor) -> None:
            scales[name] = output.float().std().item()

        return see

    for name in (
        "vision.layers.3.attention.qkv_proj",
        "text.layers.0.attention.qkv_proj",
        "text.layers.3.attention.qkv_proj",
    ):
        model.get_submodule(name).register_forward_hook(watch(name))
    batch = data.draw(0, 0, 4, True)
    with torch.no_grad():
        features = image_features(model, batch)
        loss = model.loss(batch.text, batch.labels, features)
    assert all(0.7 < scale < 1.4 for scale in (*scales.values(), features.std().item())), scales
    # The first guess is nearly even over the vocabulary
    assert abs(loss.item() - np.log(960)) < 1
    model.init_weights(0)
    with torch.no_grad():
        model.loss(batch.text, batch.labels, image_features(model, batch))
    # The usual initialization gives much smaller scales
    assert all(scale < 0.5 for scale in scales.values()), scales


def test_exported_checkpoint_loads_unchanged(data: DataSet, tmp_path: Path) -> None:
    trainer = new_trainer("--steps", "1")
    trainer.export(DEMO, tmp_path)
    loaded = load_checkpoint(tmp_path, TRAINING, dtype=torch.bfloat16)
    rounded = trainer.model.to(torch.bfloat16)
    batch = data.draw(0, 0, 1, True)
    with torch.no_grad():
        logits = [model(batch.text, image_features(model, batch)) for model in (loaded, rounded)]
    assert torch.equal(*logits)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 16_000_000


def test_exact_match_counts_whole_answers(data: DataSet) -> None:
    trainer = new_trainer("--steps", "1")
    batches = list(data.in_order(64))[::5]
    exact = trainer.exact_match(batches)
    kinds = [ALL_KINDS[kind] for batch in batches for kind in batch.kinds]
    assert list(exact) == sorted(set(kinds))
    # An untrained model gives no right answer
    assert all(share == 0 for share in exact.values())

    class Oracle(torch.nn.Module):
        """A model that predicts every label, except the last in a third of the conversations."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config
            self.device, self.dtype = torch.device("cpu"), torch.float32
            self.seen = 0
            self.wrong = 0

        def encode(self, *args: object) -> torch.Tensor:
            return self.inner.encode(*args)  # type: ignore[operator, no-any-return]

        def __call__(self, text: TextBatch, features: torch.Tensor) -> torch.Tensor:
            rows = text.input_ids.view(-1, text.max_seqlen)
            following = rows.roll(-1, 1)
            for row in range(len(rows)):
                if (self.seen + row) % 3 == 0:
                    following[row] = 0
                    self.wrong += 1
            self.seen += len(rows)
            return torch.nn.functional.one_hot(following.flatten(), 960).float()

    oracle = Oracle(trainer.model)
    trainer.model = oracle  # type: ignore[assignment]
    exact = trainer.exact_match(batches)
    right = sum(exact[kind] for kind in kinds)
    assert round(right) == oracle.seen - oracle.wrong
