"""Fine-tune Idefics2 by QLoRA with transformers' Trainer and PEFT, and measure held-out answers.

It follows the notebook of transformers' page of Idefics2: weights in NF4, adapters beside them, a
collator that makes labels. Only the import of the classes differs, so that the steps run on this
package's kernels. The demo checkpoint learns in a minute on a CPU on which belt a drawn part
belongs, which its color decides. Replace ``Parts`` to train on data of your own.

    python examples/finetune/qlora.py adapter
    python examples/finetune/qlora.py adapter --resume    # after an interruption

The adapter is in PEFT's format: ``LLM(model, quantization="nf4", adapter="adapter")`` answers with it.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from PIL import Image, ImageDraw

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.hf import (
    FiniteGradients,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
)

# The colors of the parts on each belt
BELTS = {
    "on the left.": ((214, 40, 40), (245, 130, 25), (245, 215, 40)),
    "on the right.": ((35, 150, 60), (35, 85, 205), (125, 45, 165)),
}
QUESTION = "Which belt?"
# As in the notebook: all products of text model, projection and perceiver
TARGETS = (
    r".*(text_model|modality_projection|perceiver_resampler)"
    r".*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
)
IGNORED_LABEL = -100


class Parts(torch.utils.data.Dataset[dict[str, Any]]):
    """Pictures of parts, of which the color decides the belt. Each seed is another picture."""

    def __init__(self, first_seed: int, count: int) -> None:
        self.first_seed, self.count = first_seed, count

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw a picture, and return it with its question and answer."""
        rng = random.Random(self.first_seed + index)
        answer = rng.choice(tuple(BELTS))
        image = Image.new("RGB", (112, 112), rng.choice(((250, 250, 250), (190, 220, 245))))
        left, top, side = rng.randrange(8, 56), rng.randrange(8, 56), rng.randrange(24, 48)
        draw = ImageDraw.Draw(image)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((left, top, left + side, top + side), fill=rng.choice(BELTS[answer]))
        return {"image": image, "question": QUESTION, "answer": answer}


class Collator:
    """Makes a batch of examples, whose labels are the answers.

    The notebook's leave out image tokens and padding alone. Without the question as well, all that
    is learned is the answer, and few rows of the head's product are computed.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        # Answers are then at the end of all rows
        processor.tokenizer.padding_side = "left"

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Return the processor's tensors, padded on the left, with ``labels``."""
        texts, images, lengths = [], [], []
        for example in examples:
            content = [{"type": "image"}, {"type": "text", "text": example["question"]}]
            answer = [{"type": "text", "text": example["answer"]}]
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
            prompt = self.processor.apply_chat_template(messages[:1], add_generation_prompt=True)
            texts.append(self.processor.apply_chat_template(messages).strip())
            whole, asked = self.processor.tokenizer([texts[-1], prompt])["input_ids"]
            lengths.append(len(whole) - len(asked))
            images.append([example["image"]])
        batch = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].clone()
        for labels, length in zip(batch["labels"], lengths, strict=True):
            # Padding, image tokens and the question
            labels[:-length] = IGNORED_LABEL
        return batch


def load(folder: str) -> tuple[Any, Any]:
    """Return the processor, and the model in NF4 with adapters that train."""
    processor = Idefics2Processor.from_pretrained(folder, do_image_splitting=False)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    quantization: Any = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: Any = Idefics2ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization
    )
    lora = peft.LoraConfig(
        r=8, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS, init_lora_weights="gaussian"
    )
    return processor, peft.get_peft_model(model, lora)


def accuracy(model: Any, processor: Any, rows: Parts) -> float:
    """Return the share of greedy answers that are right."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 32):
        examples = [rows[place] for place in range(start, min(start + 32, len(rows)))]
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(
            text=[prompt] * len(examples),
            images=[[example["image"]] for example in examples],
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers = processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(
            answer.strip() == example["answer"]
            for answer, example in zip(answers, examples, strict=True)
        )
    return right / len(rows)


def main() -> None:
    """Read the command line, train, and print the accuracy before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the adapter and of the checkpoints")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or id to start from")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--save-steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    transformers.set_seed(0)
    processor, model = load(args.model)
    collator = Collator(processor)
    held_out = Parts(1_000_000, args.held_out)
    before = accuracy(model, processor, held_out)
    trainer: Any = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            weight_decay=0.01,
            logging_steps=10,
            save_strategy="steps",
            save_steps=args.save_steps,
            save_total_limit=2,
            gradient_checkpointing=torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            report_to=[],
        ),
        data_collator=collator,
        train_dataset=Parts(0, args.steps * args.batch),
        callbacks=[FiniteGradients()],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.save_pretrained(str(args.out))
    after = accuracy(model, processor, held_out)
    print(f"held-out accuracy: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    main()
