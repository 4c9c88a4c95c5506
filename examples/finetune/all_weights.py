"""Train all weights of a checkpoint for a few steps on a few answers, and save it.

The demo checkpoint learns another answer about one image in seconds on a CPU. Replace ``ROWS`` to
train on your own data.

    python examples/finetune/all_weights.py tuned
    idefics2 generate --model tuned --image examples/images/shapes.png --prompt "Where is the star?"
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from idefics2_engine.hf.padded_forward import forward_padded
from idefics2_engine.prompts.processor import Processor

# Image, question and the answer to learn
ROWS = [
    ("shapes.png", "Where is the star?", "At the top right."),
    ("shapes.png", "What color is the heart?", "The heart is pink."),
]


def training_batch(processor: Processor) -> dict[str, Tensor]:
    """Return padded inputs and their labels, which are -100 outside the answers."""
    prompts, texts, images = [], [], []
    for file, question, answer in ROWS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        source = DEMO_IMAGES / file
        prompts.append(processor.chat([{"role": "user", "content": content}], [source]))
        texts.append(f"{prompts[-1].prompt} {answer}<end_of_utterance>")
        images.append([source])
    batch = {name: torch.from_numpy(a) for name, a in processor.padded(texts, images).items()}
    # Padding has no loss, whatever its labels are
    labels = batch["input_ids"].clone()
    for row, prompt in enumerate(prompts):
        # The question and its image tokens are read, not learned
        labels[row, : len(prompt.token_ids)] = -100
    return {**batch, "labels": labels}


def main() -> None:
    """Read the command line, train and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="folder to start from")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="(default: %(default)s)")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_checkpoint(args.model, device=device, dtype=torch.float32)
    processor = Processor.load(args.model, model.config)
    batch = {name: tensor.to(device) for name, tensor in training_batch(processor).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        loss = forward_padded(model, **batch).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    save_checkpoint(model, args.out, dtype=torch.bfloat16, config_from=args.model)


if __name__ == "__main__":
    main()
