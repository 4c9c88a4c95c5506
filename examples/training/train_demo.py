"""Train the demo checkpoint on drawn scenes, with one GPU and sixteen CPU cores, in minutes.

    PYTHONPATH=engine:kernels python examples/training/train_demo.py --out trained --steps 30000

The folder ``--base`` has the config, the processor's files and the tokenizer. ``--out`` gets copies
of them and the weights in bfloat16. Worker processes draw new scenes all the time, in rounds that
last ``--round-steps`` steps.

The learning rate rises over the first steps and then falls as a cosine over ``--steps``, or over
the time limit. A run that reaches its limit earlier leaves a state file, from which the same
command with ``--resume`` continues. With ``--steps`` it continues exactly.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from data_workers import DataWorkers, progress_jobs, training_jobs
from idefics2_engine.model.config import ModelConfig
from rounds import Rounds
from trainer import Trainer
from training_data import DataSet

# Seconds at the end of the limit for testing, saving and exporting
_RESERVE_SECONDS = 25.0
_TEST_BATCH = 256
# Batches of training questions that are tested beside the held-out ones
_PRACTICE_BATCHES = 12
# Seconds between state files
_SAVE_SECONDS = 120.0


def main() -> None:
    """Read the command line and train."""
    options = parser().parse_args()
    # A run with cuDNN's attention ended in NaN, for an unknown reason
    torch.backends.cuda.enable_cudnn_sdp(False)
    workers = DataWorkers(options.base, options.data_workers)
    with contextlib.closing(workers):
        _run(options, workers, time.monotonic())


def _run(options: argparse.Namespace, workers: DataWorkers, started: float) -> None:
    device = torch.device(options.device)
    config = ModelConfig.load(options.base)
    state = options.state or options.out / "state.pt"

    def log(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    def make_round(number: int) -> DataSet:
        jobs = training_jobs(options.seed, number, options.round_examples)
        return DataSet(workers.chunks(jobs), config, device)

    tests = DataSet(workers.chunks(progress_jobs(options.test_per_kind)), config, device)
    trainer = Trainer.new(options, device)
    log(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters on {device}")
    if options.resume:
        trainer.load(state)
        log(f"resumed at step {trainer.step}")
    rounds = Rounds(make_round, options.round_steps, device)

    def test() -> dict[str, dict[str, float]]:
        # Training questions differ from held-out ones only in the kinds' frequencies, so a gap
        # between the two shows overfitting
        seen = rounds.current
        drawn = (seen.draw(options.seed, n, _TEST_BATCH, True) for n in range(_PRACTICE_BATCHES))
        exact = {
            "held-out": trainer.exact_match(tests.in_order(_TEST_BATCH)),
            "training": trainer.exact_match(drawn),
        }
        for name, shares in exact.items():
            log(f"step {trainer.step} exact, {name} {_shown(shares)}")
        log(f"step {trainer.step} waited {rounds.waited:.1f} s for data so far")
        return exact

    try:
        first = rounds.at(trainer.step)
        log(
            f"{options.round_steps} steps have {first.num_scenes} scenes, "
            f"{first.num_conversations // 2} conversations in {len(first.groups)} groups, "
            f"{first.num_bytes / 1e9:.2f} GB of pixels, made in {rounds.waited:.1f} s"
        )
        del first
        deadline = started + 60 * options.minutes - _RESERVE_SECONDS
        if trainer.seconds is None and trainer.steps is None:
            trainer.seconds = 60 * (options.train_minutes or 0) or deadline - time.monotonic()
        last_log = last_save = began = time.monotonic()
        losses: list[Tensor] = []
        while not trainer.finished and began < deadline:
            batch_size, split = trainer.choose(options.batch)
            batch = rounds.at(trainer.step).draw(options.seed, trainer.step, batch_size, split)
            losses.append(trainer.train(batch))
            if trainer.step % options.log_every == 0:
                loss = torch.stack(losses).mean().item()
                each = 1e3 * (time.monotonic() - last_log) / len(losses)
                rate = f"rate {trainer.rate:.3f} {each:.1f} ms a step"
                log(f"step {trainer.step} loss {loss:.4f} {rate}")
                last_log, losses = time.monotonic(), []
            if trainer.step % options.test_every == 0:
                test()
                last_log, losses = time.monotonic(), []
            if time.monotonic() - last_save > _SAVE_SECONDS:
                trainer.save(state)
                last_save = time.monotonic()
            now = time.monotonic()
            trainer.elapsed += now - began
            began = now
        trainer.save(state)
        exact = test()
    finally:
        workers.stop()
        rounds.close()
    trainer.export(options.base, options.out)
    report = {"steps": trainer.step, "finished": trainer.finished, "exact_match": exact}
    (options.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    ending = "finished" if trainer.finished else "stopped early: --resume goes on"
    log(f"{ending}; wrote {options.out}")
    if device.type == "cuda":
        log(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory at most")


def _shown(exact: dict[str, float]) -> str:
    mean = sum(exact.values()) / len(exact)
    return f"{mean:.4f} " + " ".join(f"{kind} {share:.3f}" for kind, share in exact.items())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    built = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    demo = Path(__file__).resolve().parents[1] / "demo"
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = built.add_argument
    add("--out", type=Path, required=True, help="folder for the trained checkpoint")
    add("--base", type=Path, default=demo, help="folder with the JSON files")
    add("--init", type=Path, help="checkpoint to start from instead of random weights")
    add("--state", type=Path, help="state file; OUT/state.pt unless given")
    add("--resume", action="store_true", help="go on from the state file")
    add("--minutes", type=float, default=22.0, help="limit of this run, everything included")
    add("--train-minutes", type=float, help="length of the schedule over several runs")
    add("--steps", type=int, help="length of the schedule in steps instead")
    add(
        "--batch", type=int, default=256, help="conversations a step; twice as many of whole images"
    )
    add("--matrix-rate", type=float, default=2e-3, help="highest learning rate of Muon")
    add("--rate", type=float, default=1e-3, help="highest learning rate of AdamW, for the rest")
    add("--round-steps", type=int, default=750, help="steps that a round of data lasts")
    add("--round-examples", type=int, default=20_000, help="examples of a round, 1.3 scenes each")
    add("--test-per-kind", type=int, default=256, help="questions a kind to watch progress by")
    add("--test-every", type=int, default=6000, help="steps")
    add("--log-every", type=int, default=500, help="steps")
    add("--seed", type=int, default=0)
    workers = max(1, (os.cpu_count() or 1) - 1)
    add("--data-workers", type=int, default=workers, help="processes; 0: in this one")
    add("--device", default=default_device)
    return built


if __name__ == "__main__":
    main()
