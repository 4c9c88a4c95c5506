"""Adapters that are kept beside the weights, against PEFT, which keeps them so in training."""

import logging
import math
import warnings
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_models import batch, counted, kept_logits, worst_row
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.demo import DEMO_IMAGES, DEMO_MODEL
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.hf.padded_forward import forward_padded
from idefics2_engine.model.linear import Linear, NF4Linear, SideBySide
from idefics2_engine.model.low_rank import LowRank
from idefics2_engine.model.quantization import Quantization
from idefics2_engine.prompts.processor import Processor
from idefics2_kernels import REFERENCE, TRITON
from oracle import TinyCase, build_oracle, save_oracle

NF4, TEXT = Quantization(), Quantization(("text",))
# Every row is a whole number of blocks, as bitsandbytes' code for a CPU assumes. Queries, keys and
# values of the text model cannot be stacked, and those of the vision tower can without double
# quantization
CASE = TinyCase(
    "whole-blocks",
    (((56, 70),), ((28, 42),)),
    (9, 6),
    vision={"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192},
    perceiver={"resampler_head_dim": 32},
    text={"intermediate_size": 192, "sliding_window": 7},
)
# The layers that transformers' notebook for fine-tuning names
NOTEBOOK = (
    r".*(text_model|modality_projection|perceiver_resampler)"
    r".*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
)
KINDS: dict[str, dict[str, Any]] = {
    "notebook": {"r": 4, "lora_alpha": 6, "target_modules": NOTEBOOK},
    "every linear layer": {"r": 3, "target_modules": "all-linear"},
    "parts of fused layers": {"r": 4, "target_modules": ["k_proj", "up_proj"]},
    "one layer's": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "rank-stabilized": {"r": 5, "target_modules": ["q_proj", "fc1"], "use_rslora": True},
    "ranks and alphas by pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 19},
        "alpha_pattern": {"down_proj": 5, "q_proj": 3},
    },
    # These are no linear layers in NF4, so their pairs are merged
    "embedding and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "head whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
FOUR_BITS: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_oracle(build_oracle(CASE), tmp_path_factory.mktemp("dense"))


def in_bitsandbytes(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return transformers' model of ``folder`` in NF4.

    It is in train mode, because bitsandbytes rounds absmaxes to bf16 in inference on some CPUs.
    """
    kind: Any = transformers.BitsAndBytesConfig
    config = kind(**FOUR_BITS, bnb_4bit_compute_dtype=dtype, **settings)
    library: Any = transformers.Idefics2ForConditionalGeneration
    return library.from_pretrained(folder, dtype=dtype, quantization_config=config).train()


def with_adapter(model: Any, folder: Path, **settings: Any) -> Any:
    """Return ``model`` with a random adapter, which is written to ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        wrapped.save_pretrained(str(folder))
    return wrapped


def logits_of(model: Any) -> Tensor:
    """Return this package's logits for ``CASE``, those of padding left out."""
    inputs = batch(CASE)
    with torch.no_grad():
        logits: Tensor = forward_padded(model, **inputs).logits
    return logits[inputs["attention_mask"].bool()]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert worst_row(ours, theirs) < 2e-5


def unmerged(model: nn.Module) -> int:
    return sum(isinstance(module, LowRank) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_beside_dense_weights(kind: str, dense: Path, tmp_path: Path) -> None:
    theirs = kept_logits(with_adapter(build_oracle(CASE), tmp_path, **KINDS[kind]), batch(CASE))
    model = load_checkpoint(dense, adapter=tmp_path, merge_adapter=False)
    assert unmerged(model)
    assert_close(logits_of(model), theirs)
    # By default it is merged, which differs by rounding alone
    merged = load_checkpoint(dense, adapter=tmp_path)
    assert not unmerged(merged)
    assert_close(logits_of(merged), theirs)
    assert worst_row(logits_of(load_checkpoint(dense)), theirs) > 0.05


@pytest.mark.parametrize(
    ("kind", "double_quant"), [*((kind, True) for kind in KINDS), ("every linear layer", False)]
)
def test_beside_nf4(kind: str, double_quant: bool, dense: Path, tmp_path: Path) -> None:
    peer = in_bitsandbytes(dense, bnb_4bit_use_double_quant=double_quant)
    peer.save_pretrained(tmp_path / "nf4")
    theirs = kept_logits(with_adapter(peer, tmp_path / "adapter", **KINDS[kind]), batch(CASE))
    calls: Counter[str] = Counter()
    quantization = Quantization(double_quant=double_quant)
    for folder, asked in ((dense, quantization), (tmp_path / "nf4", None)):
        model = load_checkpoint(
            folder,
            counted(REFERENCE, calls),
            adapter=tmp_path / "adapter",
            quantization=asked,
        )
        assert_close(logits_of(model), theirs)
    # Merged before quantization, the adapter is not what was trained
    merged = load_checkpoint(
        dense, adapter=tmp_path / "adapter", quantization=quantization, merge_adapter=True
    )
    assert worst_row(logits_of(merged), theirs) > 0.01
    assert calls["lora_linear"] > 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_beside_nf4(dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    """Our distance from float64 is at most twice that of PEFT, whose pairs stay in fp32."""
    inputs = batch(CASE)
    quantized = in_bitsandbytes(dense, dtype, bnb_4bit_use_double_quant=True)
    with_adapter(in_bitsandbytes(dense), tmp_path, **KINDS["notebook"])
    results = []
    for wide in (torch.float64, dtype):
        same = build_oracle(CASE)
        for name, layer in quantized.named_modules():
            if isinstance(layer, Linear4bit):
                weight: Any = layer.weight
                wide_weight = dequantize_4bit(weight.data, weight.quant_state)
                same.get_submodule(name).weight.data.copy_(wide_weight)
        peer = peft.PeftModel.from_pretrained(same.to(wide), str(tmp_path))
        if wide is torch.float64:
            peer.double()
        results.append(kept_logits(peer, inputs))
    exact, theirs = results
    ours = logits_of(load_checkpoint(dense, dtype=dtype, adapter=tmp_path, quantization=NF4))
    assert worst_row(ours, exact) <= 2 * (worst_row(theirs, exact) + torch.finfo(dtype).eps)


def test_layers_that_were_skipped(dense: Path, tmp_path: Path) -> None:
    """Parts of a fused layer are in NF4 and others are not."""
    peer = in_bitsandbytes(
        dense, llm_int8_skip_modules=["lm_head", "v_proj", "modality_projection"]
    )
    peer.save_pretrained(tmp_path / "nf4")
    wrapped = with_adapter(peer, tmp_path / "adapter", **KINDS["notebook"])
    theirs = kept_logits(wrapped, batch(CASE))
    for merge in (None, False):
        model = load_checkpoint(tmp_path / "nf4", adapter=tmp_path / "adapter", merge_adapter=merge)
        fused = model.get_submodule("text.layers.0.attention.qkv_proj")
        assert isinstance(fused, SideBySide)
        assert fused.low_rank is not None
        assert [type(layer) for layer in fused.layers] == [NF4Linear, NF4Linear, Linear]
        # By default the change of the values is merged, as they are not in NF4
        changed = fused.low_rank.b[96:].any()
        assert changed == (merge is False)
        assert_close(logits_of(model), theirs)


def test_a_stacked_layer_has_one_change(dense: Path, tmp_path: Path) -> None:
    """Queries, keys and values are one product in NF4, and so are their changes."""
    with_adapter(build_oracle(CASE), tmp_path, **KINDS["every linear layer"])
    calls: Counter[str] = Counter()
    model = load_checkpoint(
        dense,
        counted(REFERENCE, calls),
        adapter=tmp_path,
        quantization=Quantization(double_quant=False),
    )
    layer: Any = model.get_submodule("vision.layers.0.attention.qkv_proj")
    x = torch.randn(3, 128)
    calls.clear()
    with torch.no_grad():
        out = layer(x)
        assert calls == {"lora_linear": 1}
        assert layer.low_rank.a.shape == (16, 128)
        # Once a part is replaced, it is not in the stacked weight, and the parts are apart
        layer.layers[1].weight = replace(layer.layers[1].weight)
        torch.testing.assert_close(layer(x), out, rtol=1e-5, atol=1e-5)
        assert calls == {"lora_linear": 4}
        layer.low_rank = None
        assert (layer(x) - out).abs().max() > 0.1


def test_another_table_and_device(dense: Path, tmp_path: Path) -> None:
    with_adapter(build_oracle(CASE), tmp_path, **KINDS["notebook"])
    model = load_checkpoint(dense, adapter=tmp_path, quantization=NF4)
    plain = load_checkpoint(dense, quantization=NF4)
    changes = [m for m in model.modules() if isinstance(m, LowRank)]
    assert model.num_bytes - plain.num_bytes == sum(c.a.nbytes + c.b.nbytes for c in changes)
    twin = model.with_ops(TRITON)
    own, other = (m.get_submodule("text.layers.0.mlp.gate_up_proj.low_rank") for m in (model, twin))
    assert isinstance(own, LowRank)
    assert isinstance(other, LowRank)
    assert other.a is own.a
    x = torch.randn(3, 64)
    with torch.no_grad():
        layers: Any = (m.get_submodule("text.layers.0.mlp.gate_up_proj") for m in (model, twin))
        torch.testing.assert_close(*(layer(x) for layer in layers), rtol=1e-5, atol=1e-5)
    model.double()
    assert own.b.dtype is torch.float64
    model.to("meta")
    assert own.b.is_meta


class TestRefused:
    @pytest.fixture
    def dora(self, tmp_path: Path) -> Path:
        settings = {"r": 4, "target_modules": ["fc1", "lm_head"], "use_dora": True}
        with_adapter(build_oracle(CASE), tmp_path / "dora", **settings)
        return tmp_path / "dora"

    def test_dora(self, dense: Path, dora: Path) -> None:
        beside: list[dict[str, Any]] = [{"quantization": NF4}, {"merge_adapter": False}]
        for options in beside:
            with pytest.raises(ConfigError, match=r"use_dora must be merged, got 'model\.vision"):
                load_checkpoint(dense, adapter=dora, **options)
        # The last has no weight in NF4 that the adapter changes
        merged: list[dict[str, Any]] = [{"merge_adapter": True}, {}, {"quantization": TEXT}]
        for options in merged:
            assert not unmerged(load_checkpoint(dense, adapter=dora, **options))
        load_checkpoint(dense, adapter=dora, quantization=NF4, merge_adapter=True)

    def test_merging_into_a_quantized_checkpoint(self, dense: Path, tmp_path: Path) -> None:
        in_bitsandbytes(dense).save_pretrained(tmp_path / "nf4")
        with_adapter(build_oracle(CASE), tmp_path / "adapter", **KINDS["notebook"])
        with pytest.raises(ConfigError, match="load it with merge_adapter=False"):
            load_checkpoint(tmp_path / "nf4", adapter=tmp_path / "adapter", merge_adapter=True)

    def test_whole_module_of_a_quantized_checkpoint(self, dense: Path, tmp_path: Path) -> None:
        """It was trained in 16 bit, and its place is in NF4."""
        in_bitsandbytes(dense).save_pretrained(tmp_path / "nf4")
        settings = {
            "r": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["modality_projection"],
        }
        with_adapter(build_oracle(CASE), tmp_path / "adapter", **settings)
        name = "model.connector.modality_projection.down_proj.weight"
        with pytest.raises(CheckpointError, match=f"must not hold '{name}' whole"):
            load_checkpoint(tmp_path / "nf4", adapter=tmp_path / "adapter")

    def test_values_that_overflow(self, dense: Path, tmp_path: Path) -> None:
        with_adapter(build_oracle(CASE), tmp_path, r=4, target_modules=["o_proj"])
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        options: dict[str, Any] = {"adapter": tmp_path, "quantization": NF4, "dtype": torch.float16}
        # The scale is 2
        for side, value in (("lora_B", 5e4), ("lora_A", 7e4)):
            name = next(name for name in tensors if side in name)
            save_file(tensors | {name: torch.full_like(tensors[name], value)}, file)
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(dense, check_finite=True, **options)
            assert f"'{name}' must be finite in torch.float16, got" in str(caught.value)
        tensors[name][0, 0] = math.nan
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match="must be finite, got 1 values"):
            load_checkpoint(dense, check_finite=True, **options)

    def test_saving(self, dense: Path, tmp_path: Path) -> None:
        with_adapter(build_oracle(CASE), tmp_path / "adapter", **KINDS["notebook"])
        model = load_checkpoint(dense, adapter=tmp_path / "adapter", quantization=NF4)
        with pytest.raises(ValueError, match="must have no unmerged adapter: load it without"):
            save_checkpoint(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_log_says_what_was_merged(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = KINDS["embedding and head"] | {"modules_to_save": ["post_layernorm"]}
    with_adapter(build_oracle(CASE), tmp_path, **settings)
    caplog.set_level(logging.INFO, "idefics2_engine")
    values = 2 + 2 + 3
    asked: list[tuple[dict[str, Any], int]] = [
        ({"quantization": NF4}, 4),
        ({}, 4 + values),
        ({"merge_adapter": False}, 4),
    ]
    for options, merged in asked:
        load_checkpoint(dense, adapter=tmp_path, **options)
        beside = 4 + values - merged
        said = f"adapter {tmp_path} (weights merged or replaced {merged}, unmerged {beside})"
        assert said in caplog.messages[-1]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor], Tensor, Any]:
    """Train an adapter on the demo checkpoint in bitsandbytes' NF4 for four steps.

    The result has the adapter's folder, the inputs, the trained model's logits, and the model.
    """
    folder = tmp_path_factory.mktemp("trained")
    model = in_bitsandbytes(DEMO_MODEL, bnb_4bit_use_double_quant=True)
    processor = Processor.load(DEMO_MODEL, load_checkpoint(DEMO_MODEL).config)
    text = (
        "User:<image>Where is the star?<end_of_utterance>\nAssistant: Up there.<end_of_utterance>"
    )
    arrays = processor.padded([text], [[str(DEMO_IMAGES / "shapes.png")]])
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=NOTEBOOK))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-3)
    labels = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == model.config.image_token_id, -100
    )
    for _ in range(4):
        wrapped(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(str(folder))
    return folder, inputs, kept_logits(wrapped, inputs), wrapped


@pytest.mark.long
def test_trained_adapter_answers_as_it_was_trained(trained: Any) -> None:
    adapter, inputs, theirs, _ = trained

    def logits(**options: Any) -> Tensor:
        model = load_checkpoint(DEMO_MODEL, quantization=NF4, **options)
        with torch.no_grad():
            found: Tensor = forward_padded(model, **inputs).logits
        return found[0]

    effect = (theirs - logits()).norm()
    assert effect > 50
    assert (theirs - logits(adapter=adapter)).norm() < 1e-4 * effect
    # Merged first and then quantized, it was wrong by 15 % of its effect
    lost = (theirs - logits(adapter=adapter, merge_adapter=True)).norm()
    assert lost > 0.1 * effect


@pytest.mark.long
def test_tokens_of_a_trained_adapter(trained: Any) -> None:
    adapter, _, _, peer = trained
    text = "User:<image>Where is the star?<end_of_utterance>\nAssistant:"
    image = str(DEMO_IMAGES / "shapes.png")
    arrays = Processor.load(DEMO_MODEL, load_checkpoint(DEMO_MODEL).config).padded(
        [text], [[image]]
    )
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    peer.generation_config.eos_token_id = None
    out = peer.generate(**inputs, max_new_tokens=12, do_sample=False)
    wanted = out[0, inputs["input_ids"].shape[1] :].tolist()
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompt = {"prompt": text, "multi_modal_data": {"image": image}}
    with LLM(adapter=adapter, quantization="nf4", device="cpu") as llm:
        assert list(llm.generate(prompt, params)[0].outputs[0].token_ids) == wanted
    with LLM(quantization="nf4", device="cpu") as llm:
        assert list(llm.generate(prompt, params)[0].outputs[0].token_ids) != wanted
