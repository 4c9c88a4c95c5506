"""bitsandbytes' NF4 layers with this package's product, and fine-tuning on them."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from hf_models import batch, build_peer, counted, kept_logits, worst_row
from idefics2_engine import LLM
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.hf import Idefics2ForConditionalGeneration, accelerate_model
from idefics2_engine.hf.operations import Operations, set_operations
from idefics2_engine.model.linear import NF4Linear
from idefics2_kernels import REFERENCE, TRITON
from oracle import TinyCase

# Every row is a whole number of blocks, as bitsandbytes' code for a CPU assumes
CASE = TinyCase(
    "whole-blocks",
    (((56, 70),), ((28, 42),)),
    (9, 6),
    vision={"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192},
    perceiver={"resampler_head_dim": 32},
    text={"intermediate_size": 192, "sliding_window": 7},
)
# The layers that transformers' notebook for fine-tuning names
TARGETS = (
    r".*(text_model|modality_projection|perceiver_resampler)"
    r".*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    build_peer(CASE).save_pretrained(folder)
    return folder


def load(
    library: Any, folder: Path, dtype: torch.dtype = torch.float32, double_quant: bool = True
) -> Any:
    kind: Any = transformers.BitsAndBytesConfig
    config = kind(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return library.from_pretrained(folder, dtype=dtype, quantization_config=config)


def nf4_layers(model: nn.Module) -> dict[str, Any]:
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, Linear4bit)}


def with_weights_of(folder: Path, model: nn.Module) -> Any:
    """Return transformers' model of ``folder`` in float64, with the dequantized weights of ``model``."""
    library: Any = transformers.Idefics2ForConditionalGeneration
    dense: Any = library.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    for name, layer in nf4_layers(model).items():
        weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        dense.get_submodule(name).weight.data.copy_(weight)
    return dense


@pytest.mark.parametrize(
    ("dtype", "double_quant"),
    [(torch.float32, True), (torch.float32, False), (torch.float16, True)],
    ids=["float32", "single-quant", "float16"],
)
def test_logits(dtype: torch.dtype, double_quant: bool, dense: Path) -> None:
    calls: Counter[str] = Counter()
    model = load(Idefics2ForConditionalGeneration, dense, dtype, double_quant)
    accelerate_model(model, counted(REFERENCE, calls))
    inputs = batch(CASE)
    ours = kept_logits(model, inputs)
    # All linear layers but the head are in NF4
    assert calls["nf4_matmul"] == len(nf4_layers(model)) == 50
    same = with_weights_of(dense, model)
    exact = kept_logits(copy.deepcopy(same).double(), inputs)
    theirs = kept_logits(same.to(dtype), inputs)
    assert worst_row(ours, exact) <= 2 * (worst_row(theirs, exact) + torch.finfo(dtype).eps)


def test_a_layer_on_the_kernel(dense: Path, device: torch.device) -> None:
    layer = load(Idefics2ForConditionalGeneration, dense).model.text_model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("idefics2_engine.")
    layer.to(device)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    set_operations(layer, Operations(TRITON))
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weight.t())


def test_weights_have_no_second_copy(dense: Path) -> None:
    seen: list[Any] = []

    def look(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        seen.append(weight)
        return REFERENCE.nf4_matmul(x, weight, bias)

    model = load(Idefics2ForConditionalGeneration, dense)
    accelerate_model(model, replace(REFERENCE, nf4_matmul=look))
    layer = model.model.text_model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer(torch.randn(1, 192))
        layer(torch.randn(1, 192))
        first, second = seen
        assert first is second
        state = layer.weight.quant_state
        assert first.codes.data_ptr() == layer.weight.data_ptr()
        assert first.absmax is state.absmax
        assert first.nested_absmax is state.state2.absmax
        # New parts and another dtype are seen
        other = copy.deepcopy(model.model.text_model.layers[1].mlp.down_proj.weight)
        layer.weight.data = other.data
        layer(torch.randn(1, 192))
        assert seen[-1].codes.data_ptr() == other.data_ptr()
        layer.weight.quant_state = other.quant_state
        layer(torch.randn(1, 192))
        assert seen[-1].absmax is other.quant_state.absmax
        layer.compute_dtype = torch.bfloat16
        layer(torch.randn(1, 192))
        assert seen[-1].dtype is torch.bfloat16


@pytest.mark.parametrize("double_quant", [True, False], ids=["double-quant", "single-quant"])
def test_generate_on_the_engine_shares_the_layers(double_quant: bool, dense: Path) -> None:
    model = load(Idefics2ForConditionalGeneration, dense, double_quant=double_quant)
    before = {name: layer.weight.data.clone() for name, layer in nf4_layers(model).items()}
    inputs = batch(CASE)
    asked = {"max_new_tokens": 8, "do_sample": False}
    model.generation_backend = "transformers"
    wanted = model.generate(**inputs, **asked)
    model.generation_backend = "engine"
    assert model.generate(**inputs, **asked).tolist() == wanted.tolist()
    engine = model.engine.engine
    packed = engine.runner.model
    layers = nf4_layers(model)
    ours = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for module in packed.modules()
        if isinstance(module, NF4Linear)
        for part in (module.weight.codes, module.weight.absmax)
    }
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert torch.equal(layer.weight.data, before[name])
        assert {layer.weight.untyped_storage().data_ptr()} <= ours.keys()
        assert {state.absmax.untyped_storage().data_ptr()} <= ours.keys()
    # Queries, keys and values are one product where their blocks are whole
    assert len(ours) < 2 * len(layers)
    assert model.generate(**inputs, **asked).tolist() == wanted.tolist()
    assert model.engine.engine is engine
    model.generation_backend = "transformers"
    assert model.generate(**inputs, **asked).tolist() == wanted.tolist()


def test_another_dtype_of_products_is_not_the_engines(dense: Path) -> None:
    model = load(Idefics2ForConditionalGeneration, dense)
    model.model.text_model.layers[0].mlp.up_proj.compute_dtype = torch.bfloat16
    model.generation_backend = "engine"
    with pytest.raises(ValueError, match=r"bnb_4bit_compute_dtype torch\.bfloat16"):
        model.generate(**batch(CASE), max_new_tokens=2, do_sample=False)


def test_other_formats_are_bitsandbytes(dense: Path) -> None:
    calls: Counter[str] = Counter()
    kind: Any = transformers.BitsAndBytesConfig
    fp4 = kind(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    library: Any = Idefics2ForConditionalGeneration
    model = library.from_pretrained(dense, dtype=torch.float32, quantization_config=fp4)
    accelerate_model(model, counted(REFERENCE, calls))
    kept_logits(model, batch(CASE))
    assert calls["rms_norm"] > 0
    assert calls["nf4_matmul"] == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_fine_tuning_equals_transformers(dense: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    inputs = batch(CASE)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    results = []
    for library in (
        transformers.Idefics2ForConditionalGeneration,
        Idefics2ForConditionalGeneration,
    ):
        model = load(library, dense)
        torch.manual_seed(1)
        model.add_adapter(config)
        model.enable_adapters()
        model.train()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (wanted, theirs), (loss, ours) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0.0)
    assert len(ours) == 2 * (3 * 7 + 3 + 2 * 7)
    for name, gradient in theirs.items():
        # The frozen vision tower in front of them is computed here
        assert (ours[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Four rows of text."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(5, 25) + index
        return {"input_ids": ids, "labels": ids}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_trainer_writes_an_adapter_for_the_engine(tmp_path: Path) -> None:
    model = load(Idefics2ForConditionalGeneration, DEMO_MODEL)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    arguments: Any = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
    )
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    trainer: Any = transformers.Trainer(model=wrapped, args=arguments, train_dataset=Rows())
    trainer.train()
    after = dict(wrapped.named_parameters())
    moved = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    # No row has an image
    assert moved == [name for name in before if "text_model" in name]
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    llm = LLM(DEMO_MODEL, adapter=tmp_path / "adapter", device="cpu")
    assert llm.generate("a")[0].error is None
