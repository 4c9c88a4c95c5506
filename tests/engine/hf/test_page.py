"""The programs of transformers' documentation of Idefics2, of which one import is changed.

Each program is run with transformers' classes and with this package's. Only the addresses of the
pictures and the texts differ from the documentation, and that ``generate`` must run on the engine. The hub's id is a folder of that name here.
"""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import idefics2_engine.hf
from hf_models import needs_processor
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL

pytestmark = needs_processor

HUB_ID = "HuggingFaceM4/idefics2-8b"
URLS = ["http://example.com/before.png", "http://example.com/after.png"]
QUESTION = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What color is the star?"},
        {"type": "image"},
        {"type": "image"},
    ],
}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "The star is red."}]}


def get(url: str, stream: bool) -> Any:
    """Answer as ``requests.get`` does, with a sample picture."""
    assert stream
    return SimpleNamespace(raw=io.BytesIO((DEMO_IMAGES / Path(url).name).read_bytes()))


requests = SimpleNamespace(get=get)


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``HUB_ID`` be the demo checkpoint."""
    (tmp_path / HUB_ID).parent.mkdir()
    (tmp_path / HUB_ID).symlink_to(DEMO_MODEL)
    monkeypatch.chdir(tmp_path)


def inference(library: Any, **loading: Any) -> tuple[Tensor, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    image_1 = Image.open(requests.get(URLS[0], stream=True).raw)
    image_2 = Image.open(requests.get(URLS[1], stream=True).raw)
    images = [image_1, image_2]

    processor = library.Idefics2Processor.from_pretrained(HUB_ID)
    model = library.Idefics2ForConditionalGeneration.from_pretrained(HUB_ID, **loading)
    model.to(device)

    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    inputs = processor(images=images, text=text, return_tensors="pt").to(device)

    if library is not transformers:
        model.generation_backend = "engine"
    generated_text = model.generate(**inputs, max_new_tokens=500)
    return generated_text, processor.batch_decode(generated_text, skip_special_tokens=True)[0]


def training(library: Any, **loading: Any) -> tuple[Tensor, dict[str, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    image_1 = Image.open(requests.get(URLS[0], stream=True).raw)
    image_2 = Image.open(requests.get(URLS[1], stream=True).raw)
    images = [image_1, image_2]

    processor = library.Idefics2Processor.from_pretrained(HUB_ID)
    model = library.Idefics2ForConditionalGeneration.from_pretrained(HUB_ID, **loading)
    model.to(device)

    text = processor.apply_chat_template([QUESTION, ANSWER], add_generation_prompt=False)
    inputs = processor(images=images, text=text, return_tensors="pt").to(device)

    labels = inputs.input_ids.clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    labels[labels == model.config.image_token_id] = -100

    inputs["labels"] = labels

    outputs = model(**inputs)
    loss = outputs.loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# The documentation gives no dtype. Loaded in float32, greedy tokens depend on no machine
WIDE = {"dtype": torch.float32}


def test_inference() -> None:
    wanted, answer = inference(transformers, **WIDE)
    got, text = inference(idefics2_engine.hf, **WIDE)
    assert got.tolist() == wanted.tolist()
    assert text == answer


def test_training() -> None:
    wanted, gradients = training(transformers, **WIDE)
    loss, got = training(idefics2_engine.hf, **WIDE)
    torch.testing.assert_close(loss, wanted)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if name.startswith("model.vision_model") and name.endswith("k_proj.bias"):
            # The true gradient is zero
            continue
        # The answer is nearly certain, so its gradients are differences of numbers near one: those
        # of transformers itself are 4e-5 away from float64
        assert (got[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max(), name


@pytest.mark.long
def test_attention_switch() -> None:
    wanted, _ = inference(transformers, torch_dtype=torch.float16)
    switch = {"torch_dtype": torch.float16, "attn_implementation": "flash_attention_2"}
    got, _ = inference(idefics2_engine.hf, **switch)
    assert got.tolist() == wanted.tolist()


@pytest.mark.long
def test_quantization() -> None:
    kind: Any = transformers.BitsAndBytesConfig
    quantization_config = kind(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    loading = {"torch_dtype": torch.float16, "quantization_config": quantization_config}
    wanted, _ = inference(transformers, **loading)
    got, _ = inference(idefics2_engine.hf, **loading)
    assert got.tolist() == wanted.tolist()
