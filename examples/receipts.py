"""Draw receipts, and read each into an object of a class of pydantic.

    python examples/receipts.py                                     # the demo checkpoint
    python examples/receipts.py --model HuggingFaceM4/idefics2-8b

Whatever the model sees, an answer has the fields of ``Receipt`` with values in their ranges. The
demo checkpoint knows drawn scenes and cannot read, so most of its values are wrong. The last line
says how many answers were objects and how many fields were right. This needs the extra
``structured`` and pydantic.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Literal

from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field

from idefics2_engine import LLM, SamplingParams, StructuredOutputsParams


class Receipt(BaseModel):
    """What is on a receipt."""

    # Otherwise the schema allows further keys, and a model may invent them until max_tokens
    model_config = ConfigDict(extra="forbid")

    shop: Literal["Bakery", "Market", "Books"]
    items: int = Field(ge=1, le=9)
    total_cents: int = Field(ge=1, le=9999)
    is_paid_in_cash: bool


def draw_receipt(receipt: Receipt) -> Image.Image:
    """Draw ``receipt`` as a picture."""
    lines = [
        receipt.shop,
        f"{receipt.items} items",
        f"total {receipt.total_cents / 100:.2f}",
        "cash" if receipt.is_paid_in_cash else "card",
    ]
    picture = Image.new("RGB", (220, 40 + 28 * len(lines)), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((4, 4, 215, picture.height - 5), outline="black")
    for place, line in enumerate(lines):
        pen.text((20, 20 + 28 * place), line, fill="black", font_size=20)
    return picture


def random_receipt(seed: int) -> Receipt:
    """Make a receipt."""
    dice = random.Random(seed)
    return Receipt(
        shop=dice.choice(["Bakery", "Market", "Books"]),
        items=dice.randint(1, 9),
        total_cents=dice.randint(100, 9999),
        is_paid_in_cash=dice.random() < 0.5,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read receipts with the arguments ``argv``; return 1 if an answer is no object."""
    parser = argparse.ArgumentParser(description="Read drawn receipts into objects.")
    parser.add_argument("--model", help="a checkpoint's folder or hub id (default: the demo)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=4, help="receipts (default: %(default)s)")
    args = parser.parse_args(argv)
    receipts = [random_receipt(seed) for seed in range(args.count)]
    question = {"type": "text", "text": "Read this receipt."}
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": draw_receipt(one)}, question]}]
        for one in receipts
    ]
    params = SamplingParams(
        temperature=0.0, max_tokens=100, structured_outputs=StructuredOutputsParams(json=Receipt)
    )
    with LLM(args.model, device=args.device) as llm:
        answers = [output.outputs[0] for output in llm.chat(conversations, params)]
    objects = fields = 0
    for receipt, answer in zip(receipts, answers, strict=True):
        print(answer.text)
        if isinstance(answer.parsed, Receipt):
            objects += 1
            fields += sum(
                getattr(answer.parsed, name) == getattr(receipt, name)
                for name in Receipt.model_fields
            )
    total = len(receipts) * len(Receipt.model_fields)
    print(
        f"{objects} of {len(receipts)} answers are receipts, {fields} of {total} fields are right"
    )
    return int(objects < len(receipts))


if __name__ == "__main__":
    raise SystemExit(main())
