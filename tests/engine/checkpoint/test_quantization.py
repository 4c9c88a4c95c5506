"""NF4 through the whole system, against transformers and bitsandbytes."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Idefics2ForConditionalGeneration

import idefics2_engine.checkpoint.loader
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.loader import build_model, load_checkpoint
from idefics2_engine.checkpoint.nf4_tensors import weight_name
from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.checkpoint.tensor_values import read_values
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.hf.padded_forward import forward_padded
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import Linear, NF4Linear, SideBySide
from idefics2_engine.model.quantization import PARTS, Quantization
from idefics2_kernels import REFERENCE, TRITON, NF4Weight, Ops
from idefics2_kernels.reference.nf4 import nf4_quantize
from oracle import CASES, TinyCase, build_oracle, oracle_inputs
from tiny_checkpoint import edit_json, write_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows have 48, 67 and 88 elements, so blocks begin inside rows and the last block is short
ODD = CASES[0]
TIED = next(case for case in CASES if case.tied)
# Every row is a whole number of blocks. For other rows bitsandbytes' AVX-512 code reads the wrong
# absmax.
WHOLE_BLOCKS = TinyCase(
    "whole-blocks",
    (((56, 70),), ((28, 42),)),
    (9, 6),
    vision={"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192},
    perceiver={"resampler_head_dim": 32},
    text={"intermediate_size": 192},
)
STATE = ".quant_state.bitsandbytes__nf4"
Q_PROJ = "model.text_model.layers.1.self_attn.q_proj"
NF4 = Quantization()


def make_adapter(folder: Path) -> Path:
    """Write a LoRA adapter for one projection in PEFT's format."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    name = f"base_model.model.{Q_PROJ}.lora_{{}}.weight"
    pair = {name.format("A"): torch.randn(2, 64), name.format("B"): torch.randn(64, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    return folder


def quantized_oracle(folder: Path, dtype: torch.dtype, **config: Any) -> Any:
    """Let transformers and bitsandbytes quantize the checkpoint in ``folder``."""
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    # The class has no types
    kind: Any = BitsAndBytesConfig
    return Idefics2ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, quantization_config=kind(**settings | config)
    )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    mine, wanted = tensors_of(ours), tensors_of(theirs)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype is tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def make_dense(folder: Path, case: TinyCase) -> Path:
    build_oracle(case).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"), ODD)


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("whole"), WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def transformers_checkpoint(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint that transformers and bitsandbytes make of ``dense``."""
    folder = tmp_path_factory.mktemp("theirs")
    quantized_oracle(dense, torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(transformers_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of ``transformers_checkpoint``, which a test may damage."""
    return Path(shutil.copytree(transformers_checkpoint, tmp_path / "copy"))


class TestFiles:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_quantized_checkpoint_equals_transformers_bit_for_bit(
        self, dtype: torch.dtype, double_quant: bool, dense: Path, tmp_path: Path
    ) -> None:
        oracle = quantized_oracle(dense, dtype, bnb_4bit_use_double_quant=double_quant)
        oracle.save_pretrained(tmp_path / "theirs")
        chosen = Quantization(double_quant=double_quant)
        model = load_checkpoint(dense, dtype=dtype, quantization=chosen)
        save_checkpoint(model, tmp_path / "ours", config_from=dense)
        assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
        settings = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
        wanted = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
        assert settings.pop("llm_int8_skip_modules") == ["lm_head"]
        # None means that the head alone is skipped
        assert wanted.pop("llm_int8_skip_modules") is None
        # The other settings concern int8 only
        assert settings == {name: wanted[name] for name in settings}

    def test_tied_model_is_quantized(self, tmp_path: Path) -> None:
        folder = make_dense(tmp_path / "dense", TIED)
        quantized_oracle(folder, torch.float32).save_pretrained(tmp_path / "theirs")
        model = load_checkpoint(folder, quantization=NF4)
        assert model.lm_head is model.text.embedding
        save_checkpoint(model, tmp_path / "ours", config_from=folder)
        assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
        assert load_checkpoint(tmp_path / "theirs").lm_head.shape == model.lm_head.shape

    @pytest.mark.parametrize("shard_bytes", [10**9, 2000], ids=["single", "sharded"])
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_transformers_checkpoint_is_saved_unchanged(
        self, double_quant: bool, shard_bytes: int, dense: Path, tmp_path: Path
    ) -> None:
        oracle = quantized_oracle(dense, torch.float16, bnb_4bit_use_double_quant=double_quant)
        oracle.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
        # With so many shards, some of them separate the tensors of one weight
        if shard_bytes < 10**9:
            index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
            files = index["weight_map"]
            assert any(files[n] != files[n.removesuffix(STATE)] for n in files if STATE in n)
        model = load_checkpoint(tmp_path / "theirs", dtype=torch.float16)
        save_checkpoint(
            model,
            tmp_path / "ours",
            config_from=tmp_path / "theirs",
            max_shard_bytes=shard_bytes,
        )
        assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")

    def test_saved_checkpoint_is_read_by_transformers(self, dense: Path, tmp_path: Path) -> None:
        model = load_checkpoint(dense, dtype=torch.bfloat16, quantization=NF4)
        save_checkpoint(model, tmp_path / "ours", config_from=dense, max_shard_bytes=9000)
        oracle = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
        assert oracle.dtype is torch.bfloat16
        assert json.loads((dense / "config.json").read_text())["dtype"] == "float32"
        assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "bfloat16"
        mine, read = tensors_of(tmp_path / "ours"), oracle.state_dict()
        assert read.keys() == mine.keys()
        for name, tensor in read.items():
            assert torch.equal(tensor, mine[name]), name

    @pytest.mark.parametrize("parts", [("text",), ("connector", "vision")], ids="+".join)
    def test_only_chosen_parts_are_quantized(
        self, parts: tuple[str, ...], dense: Path, tmp_path: Path
    ) -> None:
        model = load_checkpoint(dense, quantization=Quantization(parts))
        save_checkpoint(model, tmp_path, config_from=dense)
        oracle = Idefics2ForConditionalGeneration.from_pretrained(tmp_path)
        prefixes = {"vision": "model.vision_", "connector": "model.conn", "text": "model.text_"}
        for name, module in oracle.named_modules():
            if isinstance(module, nn.Linear):
                wanted = any(name.startswith(prefixes[part]) for part in parts)
                assert isinstance(module, Linear4bit) == wanted, name
        for part in PARTS:
            kinds = {type(m) for m in model.get_submodule(part).modules()}
            assert (NF4Linear in kinds) == (part in parts)
        again = load_checkpoint(tmp_path)
        for mine, before in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, before)

    def test_skipped_modules_inside_a_fused_layer_stay_dense(
        self, whole_blocks: Path, tmp_path: Path
    ) -> None:
        """transformers quantizes the head if the user's list of modules to skip leaves it out."""
        oracle = quantized_oracle(whole_blocks, torch.float32, llm_int8_skip_modules=[Q_PROJ])
        assert isinstance(oracle.lm_head, Linear4bit)
        oracle.save_pretrained(tmp_path / "theirs")
        model = load_checkpoint(tmp_path / "theirs")
        layer = model.get_submodule("text.layers.1.attention.qkv_proj")
        assert isinstance(layer, SideBySide)
        assert [type(part) for part in layer.layers] == [Linear, NF4Linear, NF4Linear]
        exact = dequantized(whole_blocks, tmp_path / "theirs", torch.float64)
        assert_three_way(model, oracle.train(), exact, WHOLE_BLOCKS)

        save_checkpoint(model, tmp_path / "ours", config_from=tmp_path / "theirs")
        skipped = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
        assert skipped["llm_int8_skip_modules"] == ["lm_head", Q_PROJ]
        mine, wanted = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
        head = {name for name in wanted if name.startswith("lm_head")}
        assert mine.keys() == (wanted.keys() - head) | {"lm_head.weight"}
        for name in wanted.keys() - head:
            assert torch.equal(mine[name], wanted[name]), name

    def test_dense_model_is_saved_without_quantization_config(
        self, copy: Path, tmp_path: Path
    ) -> None:
        save_checkpoint(
            build_model(ModelConfig.load(DEMO_MODEL)), tmp_path / "new", config_from=copy
        )
        assert "quantization_config" not in json.loads((tmp_path / "new/config.json").read_text())


def dequantized(dense: Path, quantized: Path, dtype: torch.dtype) -> Any:
    """Build transformers' dense model of the weights in ``quantized``.

    bitsandbytes dequantizes them.
    """
    tensors = tensors_of(quantized)
    oracle: Any = Idefics2ForConditionalGeneration.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name + STATE not in tensors:
                parameter.copy_(tensors[name])
                continue
            state = {k: t for k, t in tensors.items() if k.startswith(f"{name}.")}
            full = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
            # A flat shape avoids a fault of bitsandbytes' AVX-512 code
            full.shape = torch.Size([parameter.numel()])
            values = bnb.dequantize_4bit(tensors[name], full)
            parameter.copy_(values.view(parameter.shape))
    return oracle.to(dtype)


def worst_row(logits: Tensor, exact: Tensor) -> float:
    """Return the largest error of a row, relative to its largest value."""
    return float(((logits.double() - exact).abs().amax(-1) / exact.abs().amax(-1)).max())


def assert_three_way(model: Idefics2, same_dtype: Any, exact: Any, case: TinyCase) -> None:
    """Compare ``model`` with ``exact`` (float64) by the criterion for whole models.

    Its error may be twice that of ``same_dtype``.
    """
    inputs = oracle_inputs(case)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        here = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        ours = forward_padded(model, **here).logits.cpu()[kept]
        theirs, true = (oracle(**inputs).logits[kept] for oracle in (same_dtype, exact))
    assert ours.dtype is model.dtype
    eps = torch.finfo(model.dtype).eps
    assert worst_row(ours, true) <= 2 * (worst_row(theirs, true) + eps)


class TestLogits:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_logits_are_as_close_to_float64_as_transformers(
        self, dtype: torch.dtype, double_quant: bool, whole_blocks: Path, tmp_path: Path
    ) -> None:
        oracle = quantized_oracle(whole_blocks, dtype, bnb_4bit_use_double_quant=double_quant)
        oracle.save_pretrained(tmp_path)
        exact = dequantized(whole_blocks, tmp_path, torch.float64)
        # bitsandbytes' inference code for AVX-512 rounds absmaxes to bf16, and its code for
        # training does not
        oracle.train()
        chosen = Quantization(double_quant=double_quant)
        for model in (
            load_checkpoint(whole_blocks, dtype=dtype, quantization=chosen),
            load_checkpoint(tmp_path, dtype=dtype),
        ):
            assert_three_way(model, oracle, exact, WHOLE_BLOCKS)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_may_begin_inside_blocks(
        self, dtype: torch.dtype, dense: Path, tmp_path: Path
    ) -> None:
        quantized_oracle(dense, dtype).save_pretrained(tmp_path)
        same, exact = (dequantized(dense, tmp_path, each) for each in (dtype, torch.float64))
        assert_three_way(load_checkpoint(tmp_path, dtype=dtype), same, exact, ODD)

    @pytest.mark.parametrize("case", ["odd", "whole"])
    def test_logits_on_the_kernels(
        self, case: str, dense: Path, whole_blocks: Path, device: torch.device, tmp_path: Path
    ) -> None:
        folder, tiny = {"odd": (dense, ODD), "whole": (whole_blocks, WHOLE_BLOCKS)}[case]
        quantized_oracle(folder, torch.float32).save_pretrained(tmp_path)
        same, exact = (dequantized(folder, tmp_path, d) for d in (torch.float32, torch.float64))
        assert_three_way(load_checkpoint(tmp_path, TRITON, device), same, exact, tiny)

    def test_wrong_offset_exceeds_the_bound(self, whole_blocks: Path, tmp_path: Path) -> None:
        """Another tensor's offset must be noticed.

        Fusing the states of parts invites this error.
        """
        oracle = quantized_oracle(whole_blocks, torch.float32)
        oracle.save_pretrained(tmp_path)
        exact = dequantized(whole_blocks, tmp_path, torch.float64)
        model = load_checkpoint(tmp_path)
        layer: Any = model.get_submodule("text.layers.1.attention.qkv_proj")
        q, k, _ = layer.layers
        of_q = q.weight.offset[0].expand_as(k.weight.offset).clone()
        k.weight = replace(k.weight, offset=of_q)
        with pytest.raises(AssertionError):
            assert_three_way(model, oracle.train(), exact, WHOLE_BLOCKS)


class TestLoading:
    @pytest.mark.parametrize("shard_bytes", [10**9, 2000], ids=["single", "sharded"])
    def test_tensors_of_a_weight_are_read_together(
        self, shard_bytes: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other weights are read in between only if a weight's tensors are in two shards."""
        quantized_oracle(dense, torch.bfloat16).save_pretrained(
            tmp_path, max_shard_size=shard_bytes
        )
        order = list[StoredTensor]()

        def spy(tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
            for source, tensor in read_values(tensors):
                order.append(source)
                yield source, tensor

        monkeypatch.setattr(idefics2_engine.checkpoint.loader, "read_values", spy)
        load_checkpoint(tmp_path)
        runs = [key for key, _ in groupby(order, lambda t: (t.file, weight_name(t.name)))]
        assert len(runs) == len(set(runs))
        assert len({t.file for t in order}) == len(list(groupby(t.file for t in order)))

    def test_names_without_the_prefix_are_accepted(self, copy: Path, tmp_path: Path) -> None:
        """The six tensors of a weight have the same prefix, as transformers reads them."""
        file = copy / "model.safetensors"
        names = {name: name.removeprefix("model.") for name in load_file(file)}
        respelled = {names[name]: tensor for name, tensor in load_file(file).items()}
        save_checkpoint(load_checkpoint(copy), tmp_path / "before", config_from=copy)
        save_file(respelled, file, metadata={"format": "pt"})
        save_checkpoint(load_checkpoint(copy), tmp_path / "after", config_from=copy)
        assert_same_tensors(tmp_path / "after", tmp_path / "before")
        from_pretrained: Any = Idefics2ForConditionalGeneration.from_pretrained
        _, info = from_pretrained(copy, output_loading_info=True)
        assert not info["missing_keys"]

    def test_one_dense_weight_exists_at_a_time(
        self, dense: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        allocate, seen, allocated = Idefics2.allocate, list[weakref.ref[Tensor]](), set[str]()

        def spy(model: Idefics2, device: torch.device | str) -> None:
            assert all(parameter.is_meta for parameter in model.parameters())
            allocated.update(name for name, p in model.named_parameters() if p.ndim == 2)
            allocate(model, device)

        def quantize(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
            assert not any(earlier() is not None for earlier in seen)
            seen.append(weakref.ref(weight))
            return nf4_quantize(weight, double_quant=double_quant)

        monkeypatch.setattr(Idefics2, "allocate", spy)
        model = load_checkpoint(dense, replace(REFERENCE, nf4_quantize=quantize), quantization=NF4)
        layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
        # The terms are vision, connector and text
        assert len(seen) == len(layers) == 2 * 6 + 3 + 2 * 7 + 3 * 7
        patches = {"vision.patch_embedding.weight", "vision.position_embedding"}
        assert allocated == patches | {"connector.perceiver.latents", "text.embedding", "lm_head"}

    def test_weights_of_one_input_are_fused(self, tmp_path: Path) -> None:
        """If every part is whole nested blocks, one product replaces two.

        The parts share one memory, and saved files do not change.
        """
        case = TinyCase(
            "wide",
            (),
            (5, 3),
            vision={"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192},
            text={"intermediate_size": 256},
        )
        quantized_oracle(make_dense(tmp_path / "dense", case), torch.float32).save_pretrained(
            tmp_path / "theirs"
        )
        products: list[NF4Weight] = []

        def multiply(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
            products.append(weight)
            return REFERENCE.nf4_matmul(x, weight, bias)

        model = load_checkpoint(tmp_path / "theirs", replace(REFERENCE, nf4_matmul=multiply))
        layer: Any = model.get_submodule("text.layers.0.mlp.gate_up_proj")
        gate, up = (part.weight for part in layer.layers)
        assert gate.offset[0] != up.offset[0]
        x = torch.randn(3, 64)
        both = layer(x)
        assert [weight.shape for weight in products] == [(512, 64)]
        assert gate.codes.untyped_storage().data_ptr() == products[0].codes.data_ptr()
        assert up.codes.untyped_storage().data_ptr() == products[0].codes.data_ptr()
        apart = torch.cat([REFERENCE.nf4_matmul(x, weight) for weight in (gate, up)], -1)
        assert torch.equal(both, apart)
        save_checkpoint(model, tmp_path / "ours", config_from=tmp_path / "theirs")
        assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")

        of_vision: Any = model.get_submodule("vision.layers.1.attention.qkv_proj")
        for part in of_vision.layers:
            torch.nn.init.normal_(part.bias)
        x_vision = torch.randn(3, 128)
        several = torch.cat([part(x_vision) for part in of_vision.layers], -1)
        products.clear()
        assert torch.equal(of_vision(x_vision), several)
        assert [weight.shape for weight in products] == [(384, 128)]

        products.clear()
        model.double()
        assert torch.equal(layer(x), apart)
        assert len(products) == 1
        layer.layers[1].weight = gate
        assert torch.equal(layer(x), torch.cat([apart[:, :256], apart[:, :256]], -1))
        model.to("meta")
        assert {part.weight.device.type for part in layer.layers} == {"meta"}

    def test_adapter_is_merged_before_quantization(self, dense: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter")
        merged = load_checkpoint(dense, dtype=torch.bfloat16, adapter=adapter)
        save_checkpoint(merged, tmp_path / "merged", config_from=dense)
        ours, wanted, plain = (
            load_checkpoint(
                folder, dtype=torch.bfloat16, adapter=each, merge_adapter=True, quantization=NF4
            ).get_submodule("text.layers.1.attention.qkv_proj.layers.0")
            for folder, each in ((dense, adapter), (tmp_path / "merged", None), (dense, None))
        )
        assert isinstance(ours, NF4Linear)
        assert isinstance(wanted, NF4Linear)
        assert isinstance(plain, NF4Linear)
        for name, tensor in wanted.weight.tensors.items():
            assert torch.equal(ours.weight.tensors[name], tensor), name
        assert not torch.equal(ours.weight.codes, plain.weight.codes)

    def test_random_weights(self) -> None:
        config = ModelConfig.from_dict(ODD.config().to_dict())
        models = []
        for double_quant in (True, True, False):
            model = build_model(config, dtype=torch.bfloat16, quantization=NF4)
            model.init_weights(3, double_quant=double_quant)
            layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
            assert all(layer.weight.is_nested == double_quant for layer in layers)
            assert all(layer.weight.dtype is torch.bfloat16 for layer in layers)
            models.append([layer.weight.codes for layer in layers])
        for again in models[1:]:
            assert all(map(torch.equal, models[0], again))
        assert len({tuple(codes.tolist()) for codes in models[0]}) == len(models[0])

    def test_casting_the_model_keeps_nf4_dtypes(self, transformers_checkpoint: Path) -> None:
        model = load_checkpoint(transformers_checkpoint, dtype=torch.bfloat16)
        layer: Any = model.get_submodule("text.layers.0.attention.o_proj")
        before = layer.weight
        model.double()
        assert model.dtype is torch.float64
        assert layer.weight is before
        model.to("meta")
        assert {part.device.type for part in layer.weight.tensors.values()} == {"meta"}
        assert layer.weight.offset.dtype is torch.float32

    def test_layer_without_its_weight_is_an_error(self) -> None:
        layer = NF4Linear(64, 3, REFERENCE, bias=False)
        with pytest.raises(RuntimeError, match=r"shape \(3, 64\) was not loaded"):
            layer(torch.zeros(1, 64))
        with pytest.raises(ValueError, match=r"must have shape \(3, 64\), got \(64, 3\)"):
            layer.weight = nf4_quantize(torch.zeros(64, 3))


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"quantization": "int8"}, "quantization must be 'nf4', got 'int8'"),
            ({"quantization": 4}, "quantization must be 'nf4', got 4"),
            (
                {"quantization": "nf4", "quantized_parts": ("text", "head")},
                r"quantized_parts must be a list .*, each one of 'vision', 'connector', 'text', got 'head' in \('text', 'head'\)",
            ),
            (
                {"quantization": "nf4", "quantized_parts": ()},
                r"a list of one or more parts, got \(\)",
            ),
            (
                {"quantization": "nf4", "quantized_parts": "text"},
                "quantized_parts must be a list of one or more parts, got 'text'",
            ),
            ({"quantized_parts": ("text",)}, "must come with quantization"),
            ({"double_quant": False}, "must come with quantization"),
            (
                {"quantization": "nf4", "dtype": torch.float64},
                "dtype must be bfloat16, float16 or float32 with weights in NF4, got torch.float64",
            ),
        ],
    )
    def test_invalid_arguments_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            LLM(device="cpu", **arguments)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"quant_method": "gptq", "bits": 4}, "quant_method must be 'bitsandbytes', with weights in NF4, got 'gptq'"),
            ({"quant_method": "awq", "bits": 4}, "quant_method must be 'bitsandbytes', with weights in NF4, got 'awq'"),
            ({"bits": 4}, "quant_method must be 'bitsandbytes', with weights in NF4, got None"),
            ({"quant_method": ["awq"]}, r"quant_method must be .*, got \['awq'\]"),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit: weights must be in NF4, got int8"),
            ({"_load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit: weights must be in NF4, got int8"),
            ({"quant_method": "bitsandbytes"}, "load_in_4bit must be true, got None"),
            ({"load_in_4bit": "yes"}, "load_in_4bit must be true or false, got 'yes'"),
            ({"load_in_4bit": True}, "bnb_4bit_quant_type must be 'nf4', got 'fp4'"),
            ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type must be 'nf4', got 'fp4'"),
            ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage must be 'uint8', got 'bfloat16'"),
            ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules must be names of modules, got 'lm_head'"),
            ({"llm_int8_skip_modules": [3]}, r"llm_int8_skip_modules must be names of modules, got \[3\]"),
            ("nf4", "quantization_config must be an object, got 'nf4'"),
        ],
    )  # fmt: skip
    def test_invalid_configs_are_refused(self, settings: Any, message: str) -> None:
        if isinstance(settings, dict) and any(
            key.startswith(("bnb_4bit_quant_st", "llm")) for key in settings
        ):
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | settings
        config = {"model_type": "idefics2", "image_token_id": 5, "quantization_config": settings}
        with pytest.raises(ConfigError, match=message):
            ModelConfig.from_dict(config)

    def test_quantized_checkpoint_is_not_quantized_again(
        self, transformers_checkpoint: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="is quantized already: load it without quantization"):
            load_checkpoint(transformers_checkpoint, quantization=NF4)
        adapter = make_adapter(tmp_path / "adapter")
        with pytest.raises(ConfigError, match="an adapter must be merged before that"):
            load_checkpoint(transformers_checkpoint, adapter=adapter, merge_adapter=True)
        with pytest.raises(ConfigError, match="quantization_config must be absent"):
            build_model(ModelConfig.load(transformers_checkpoint))
        with pytest.raises(ConfigError, match=r"dtype must be .* got torch.float64"):
            load_checkpoint(transformers_checkpoint, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"dtype must be .* got torch.float64"):
            save_checkpoint(
                load_checkpoint(transformers_checkpoint), tmp_path / "new", torch.float64
            )
        assert not (tmp_path / "new").exists()

    def test_contradicting_config_and_tensors_are_refused(
        self, copy: Path, dense: Path, tmp_path: Path
    ) -> None:
        settings = json.loads((copy / "config.json").read_text())["quantization_config"]
        edit_json(copy / "config.json", quantization_config=None)
        with pytest.raises(CheckpointError, match="must have a quantization_config, as tensors"):
            load_checkpoint(copy)
        other = Path(shutil.copytree(dense, tmp_path / "other"))
        edit_json(other / "config.json", quantization_config=settings)
        with pytest.raises(CheckpointError, match="has a quantization_config, but no tensor is"):
            load_checkpoint(other)

    @pytest.mark.parametrize(
        ("end", "change", "message"),
        [
            ("", None, f"tensors are missing: {Q_PROJ}.weight"),
            (".absmax", None, f"tensors are missing: {Q_PROJ}.weight.absmax"),
            (".quant_map", None, "tensors are missing"),
            (".nested_absmax", None, "tensors are missing"),
            (".nested_quant_map", None, "tensors are missing"),
            (STATE, None, "tensors are not part of this model"),
            ("", lambda t: t[:-1].clone(), r"q_proj.weight' must have shape \(2048, 1\), got \(2047, 1\)"),
            ("", lambda t: t.view(-1), r"must have shape \(2048, 1\), got \(2048,\)"),
            ("", lambda t: t.view(torch.int8), "q_proj.weight' must be U8, got I8"),
            (".absmax", lambda t: t[:-1].clone(), r"absmax' must have shape \(64,\), got \(63,\)"),
            (".absmax", lambda t: t.float(), "absmax' must be U8, got F32"),
            (".nested_absmax", lambda t: t.repeat(2), r"nested_absmax' must have shape \(1,\), got \(2,\)"),
            (".nested_absmax", lambda t: t.half(), "nested_absmax' must be F32, got F16"),
            (".nested_quant_map", lambda t: t[:16].clone(), r"nested_quant_map' must have shape \(256,\), got \(16,\)"),
            (".nested_quant_map", lambda t: t.double(), "nested_quant_map' must be F32, got F64"),
            (".quant_map", lambda t: t[:15].clone(), r"quant_map' must have shape \(16,\), got \(15,\)"),
            (".quant_map", lambda t: t.bfloat16(), "quant_map' must be F32, got BF16"),
            (".quant_map", lambda t: t * 1.001, "quant_map' must hold the 16 values of NF4, got"),
            (STATE, lambda t: t.float(), "must be U8, got F32"),
            (STATE, lambda t: t.repeat(99), "must have at most 4096 bytes in one row, got shape"),
            (STATE, lambda t: t.view(1, -1), "must have at most 4096 bytes in one row, got shape"),
            (STATE, lambda t: t[1:].clone(), "bitsandbytes__nf4': .* is not JSON"),
        ],
    )  # fmt: skip
    def test_damaged_tensors_are_refused(
        self, end: str, change: Callable[[Tensor], Tensor] | None, message: str, copy: Path
    ) -> None:
        tensors = tensors_of(copy)
        tensor = tensors.pop(f"{Q_PROJ}.weight{end}")
        if change is not None:
            tensors[f"{Q_PROJ}.weight{end}"] = change(tensor)
        save_file(tensors, copy / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_type": "fp4"}, "quant_type must be 'nf4', got 'fp4'"),
            ({"blocksize": 128}, "blocksize must be 64, got 128"),
            ({"blocksize": None}, "blocksize must be 64, got None"),
            ({"shape": [32, 128]}, r"shape must be \[64, 64\], got \[32, 128\]"),
            ({"dtype": "float64"}, "dtype must be 'bfloat16' or 'float16' or 'float32', got 'float64'"),
            ({"nested_blocksize": 64}, "nested_blocksize must be 256, got 64"),
            ({"nested_dtype": "float16"}, "nested_dtype must be 'float32', got 'float16'"),
            ({"nested_offset": None}, "nested_offset must be a number in fp32, got None"),
            ({"nested_offset": float("nan")}, "nested_offset must be a number in fp32, got nan"),
            ({"nested_offset": 1e300}, r"nested_offset must be a number in fp32, got 1e\+300"),
            ({"nested_offset": "0.5"}, "nested_offset must be a number in fp32, got '0.5'"),
        ],
    )  # fmt: skip
    def test_invalid_states_are_refused(
        self, change: dict[str, Any], message: str, copy: Path
    ) -> None:
        tensors = tensors_of(copy)
        name = f"{Q_PROJ}.weight{STATE}"
        state = json.loads(bytes(tensors[name].tolist())) | change
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        save_file(tensors, copy / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(copy)

    def test_values_that_are_not_finite_are_refused(
        self, copy: Path, dense: Path, tmp_path: Path
    ) -> None:
        tensors = tensors_of(copy)
        tensors[f"{Q_PROJ}.weight.nested_absmax"][0] = torch.inf
        save_file(tensors, copy / "model.safetensors")
        load_checkpoint(copy)
        with pytest.raises(
            CheckpointError, match=r"q_proj.weight' must be finite in torch.float32"
        ):
            load_checkpoint(copy, check_finite=True)

        large = Path(shutil.copytree(dense, tmp_path / "large"))
        tensors = tensors_of(large)
        tensors[f"{Q_PROJ}.weight"][3, 5] = 1e5
        save_file(tensors, large / "model.safetensors")
        load_checkpoint(large, dtype=torch.bfloat16, quantization=NF4, check_finite=True)
        with pytest.raises(
            CheckpointError, match=r"finite in torch.float16, got 1 values .* \[3, 5\]"
        ):
            load_checkpoint(large, dtype=torch.float16, quantization=NF4, check_finite=True)


class TestWholeSystem:
    def test_runtime_gives_the_tokens_of_equivalent_dense_weights(self, tmp_path: Path) -> None:
        """Single requests, a batch, and the equivalent dense weights give the same tokens."""
        dense = tmp_path / "dense"
        write_checkpoint(dense)
        model = load_checkpoint(dense, quantization=NF4)
        save_checkpoint(model, tmp_path / "nf4", config_from=dense)
        plain = Path(shutil.copytree(dense, tmp_path / "plain"))
        dequantized(dense, tmp_path / "nf4", torch.float32).save_pretrained(plain)
        prompts = ["A picture of", "In this image, we see a", "Once upon a time there was a", "It"]
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)

        def answers(together: bool = True, **arguments: Any) -> list[tuple[int, ...]]:
            llm = LLM(device="cpu", max_model_len=64, **arguments)
            asked = [prompts] if together else [[prompt] for prompt in prompts]
            outputs = [output for some in asked for output in llm.generate(some, params)]
            return [tuple(output.outputs[0].token_ids) for output in outputs]

        wanted = answers(model=plain)
        assert len(set(wanted)) > 1
        assert wanted != answers(model=dense)
        assert answers(model=dense, quantization="nf4") == wanted
        assert answers(model=tmp_path / "nf4") == wanted
        assert answers(together=False, model=tmp_path / "nf4") == wanted
        assert answers(model=tmp_path / "nf4", max_num_batched_tokens=3, max_num_seqs=2) == wanted

    def test_runtime_on_the_kernels(self, device: torch.device, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        # The large vocabulary takes the interpreter long, and the head is not in NF4
        kernels = replace(TRITON, linear=REFERENCE.linear, sample=REFERENCE.sample)

        def tokens(ops: Ops) -> list[int]:
            llm = LLM(
                tmp_path,
                device=device.type,
                dtype="float32",
                quantization="nf4",
                max_model_len=64,
                max_num_seqs=1,
                ops=ops,
            )
            return list(llm.generate("In this image", params)[0].outputs[0].token_ids)

        assert tokens(kernels) == tokens(REFERENCE)

    def test_dummy_weights(self) -> None:
        llm = LLM(device="cpu", load_format="dummy", quantization="nf4", quantized_parts=["text"])
        assert any(isinstance(layer, NF4Linear) for layer in llm.model.text.modules())
        assert not any(isinstance(layer, NF4Linear) for layer in llm.model.vision.modules())
        llm.generate("Where", SamplingParams(max_tokens=1))

    def test_quantize_from_the_command_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "nf4"
        assert main(["quantize", str(DEMO_MODEL), str(out), "--device", "cpu"]) == 0
        assert " MB of weights, from 15.0 MB" in capsys.readouterr().out
        quantized_oracle(DEMO_MODEL, torch.bfloat16).save_pretrained(tmp_path / "theirs")
        assert_same_tensors(out, tmp_path / "theirs")

        question = ["generate", "--device", "cpu", "--prompt", "Where is the star?"]
        question += ["--image", str(DEMO_MODEL.parents[0] / "images" / "shapes.png")]
        for model in (["--model", str(out)], ["--quantization", "nf4"]):
            assert main([*question, *model]) == 0
            assert capsys.readouterr().out == "The star is at the top right.\n"

        assert main(["quantize", str(DEMO_MODEL), str(out)]) == 2
        assert "must be a new folder or an empty one" in capsys.readouterr().err
        assert main(["quantize", str(out), str(tmp_path / "twice")]) == 2
        assert "is quantized already" in capsys.readouterr().err
        assert not (tmp_path / "twice").exists()
        assert main([*question, "--quantized-part", "text"]) == 2
        assert "must come with quantization" in capsys.readouterr().err
        partly = tmp_path / "partly"
        options = ["--quantized-part", "text", "--no-double-quant", "--dtype", "float16"]
        assert main(["quantize", str(DEMO_MODEL), str(partly), "--device", "cpu", *options]) == 0
        states = {name for name in tensors_of(partly) if "nested" in name or STATE in name}
        assert states
        assert all("text_model" in name and "nested" not in name for name in states)
