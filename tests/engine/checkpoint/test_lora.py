"""LoRA adapters, merged as PEFT merges them."""

import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.lora import Adapter
from idefics2_engine.checkpoint.lora_config import AdapterConfig
from idefics2_engine.checkpoint.name_pattern import NamePattern
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.model.batch import TextBatch
from idefics2_engine.model.quantization import Quantization
from oracle import CASES, build_oracle, image_batch, padded_pixels, save_oracle

TIED = next(case for case in CASES if case.tied)
# The targets of Idefics2's own fine-tuning script
EVERYTHING = (
    r".*(text_model|modality_projection|perceiver_resampler).*"
    r"(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
)
Q_PROJ = "base_model.model.model.text_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_oracle(build_oracle(CASES[0]), tmp_path_factory.mktemp("base"))


def train(folder: Path, case: Any = CASES[0], **settings: Any) -> None:
    """Write an adapter to ``folder`` with random tensors, as after training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build_oracle(case), peft.LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        model.save_pretrained(str(folder))


def load_in_peft(adapter: Path, merged: bool = True) -> Any:
    """Return PEFT's model with ``adapter``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(build_oracle(CASES[0]), str(adapter))
        return model.merge_and_unload() if merged else model


def edit(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


KINDS: dict[str, dict[str, Any]] = {
    "everything": {"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING},
    "every linear layer": {"r": 3, "target_modules": "all-linear"},
    "one layer's": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "rank-stabilized": {"r": 4, "target_modules": ["q_proj", "fc1"], "use_rslora": True},
    "ranks and alphas by pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        # PEFT writes them in alphabetical order, and the first match counts
        "rank_pattern": {
            r"^model\.connector.*q_proj": 3,
            "layers.0.self_attn.q_proj": 2,
            "v_proj": 7,
        },
        "alpha_pattern": {"model.text_model.layers.1.mlp.down_proj": 5, "proj": 99, "q_proj": 3},
    },
    "embedding and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "embedding and head whole": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "a module whole": {
        "r": 4,
        "target_modules": ["gate_proj"],
        "exclude_modules": ".*modality_projection.*",
        "modules_to_save": ["modality_projection", "post_layernorm"],
    },
    "the connector whole": {"r": 4, "target_modules": EVERYTHING, "modules_to_save": ["connector"]},
    "the perceiver whole": {
        "r": 4,
        "target_modules": ["gate_proj"],
        "modules_to_save": ["perceiver_resampler"],
    },
    "the vision tower whole": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["vision_model"],
    },
    "positions": {"r": 4, "target_modules": ["position_embedding"]},
    "gaussian": {"r": 4, "target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
    "fan in, fan out": {"r": 4, "target_modules": ["o_proj"], "fan_in_fan_out": True},
    "dropout": {"r": 4, "target_modules": ["o_proj"], "lora_dropout": 0.3},
    "dora": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True},
    "rank-stabilized dora": {
        "r": 4,
        "target_modules": ["q_proj", "fc1"],
        "use_dora": True,
        "use_rslora": True,
    },
    "dora of embedding and head": {
        "r": 4,
        "target_modules": ["embed_tokens", "lm_head", "v_proj"],
        "use_dora": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_pefts_bit_for_bit(kind: str, base: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter", **KINDS[kind])
    if kind == "fan in, fan out":
        # PEFT writes another value for this setting
        edit(tmp_path / "adapter", fan_in_fan_out=True)
    model = load_checkpoint(base, adapter=tmp_path / "adapter")
    save_checkpoint(model, tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = load_in_peft(tmp_path / "adapter").state_dict()
    untouched = load_file(base / "model.safetensors")
    changed = 0
    for name, tensor in ours.items():
        assert torch.equal(tensor, wanted[name]), name
        changed += not torch.equal(tensor, untouched[name])
    assert changed == len(Adapter.load(tmp_path / "adapter").changed) > 0


def test_logits_equal_those_of_the_unmerged_adapter(base: Path, tmp_path: Path) -> None:
    train(tmp_path, **KINDS["everything"])
    case = CASES[0]
    tiles, ids = case.make_tiles(), case.token_ids()
    values, mask = padded_pixels(tiles)
    expected = (
        load_in_peft(tmp_path, merged=False)
        .eval()(input_ids=torch.tensor(ids), pixel_values=values, pixel_attention_mask=mask)
        .logits[0]
    )
    model = load_checkpoint(base, adapter=tmp_path)
    images = image_batch(tiles)
    assert images is not None
    logits = model(TextBatch.from_ids(ids), model.image_features(images))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    plain = load_checkpoint(base)
    unchanged = plain(TextBatch.from_ids(ids), plain.image_features(images))
    assert (logits - unchanged).abs().max() > 0.1


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_sum_is_wide_and_rounded_once(
    stored: torch.dtype, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    train(tmp_path / "adapter", r=4, target_modules=["q_proj"])
    half = {n: t.to(stored) for n, t in load_file(base / "model.safetensors").items()}
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(half, tmp_path / "model.safetensors")
    model = load_checkpoint(tmp_path, dtype=dtype, adapter=tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (tensors[f"{Q_PROJ}.lora_{side}.weight"].to(wide) for side in "AB")
    weight = half["model.text_model.layers.0.self_attn.q_proj.weight"].to(wide)
    qkv: Any = dict(model.named_parameters())["text.layers.0.attention.qkv_proj.weight"]
    assert torch.equal(qkv[: weight.shape[0]], (weight + b @ a * 2).to(dtype))


class TestConfig:
    """Tests that adapters other than plain LoRA are refused before a weight is read."""

    def load(self, folder: Path, **changes: Any) -> AdapterConfig:
        plain: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(plain | changes))
        return AdapterConfig.load(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
            ({"peft_type": "ADALORA"}, "peft_type must be 'LORA', got 'ADALORA'"),
            ({"peft_type": None}, "peft_type must be 'LORA', got None"),
            (
                {"use_bdlora": True},
                "use_bdlora is not supported, only LoRA and DoRA are, got True: merge the adapter with PEFT's merge_and_unload",
            ),
            ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
            ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
            ({"modules_to_save": ["lm_head", 1]}, "modules_to_save must be a list of names"),
            ({"modules_to_save": [""]}, "modules_to_save must be a list of names"),
            ({"bias": "all"}, "bias must be 'none', got 'all'"),
            ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'"),
            ({"lora_bias": True}, "lora_bias is not supported"),
            ({"use_qalora": True}, "use_qalora is not supported"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is not supported"),
            ({"target_parameters": ["x"]}, "target_parameters is not supported"),
            ({"layer_replication": [[0, 4]]}, "layer_replication is not supported"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or False or"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights must be True or False or"),
            ({"init_lora_weights": 1}, "init_lora_weights must be True or False or"),
            ({"use_tomorrows_idea": True}, "use_tomorrows_idea is not supported"),
            ({"r": 0}, "r must be a positive integer, got 0"),
            ({"r": -4}, "r must be a positive integer, got -4"),
            ({"r": 4.0}, "r must be a positive integer, got 4.0"),
            ({"r": 2**40}, "r must be at most 65536"),
            ({"lora_alpha": "16"}, "lora_alpha must be a positive number, got '16'"),
            ({"lora_alpha": math.nan}, "lora_alpha must be a positive number, got nan"),
            ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
            ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
            ({"rank_pattern": {"q_proj": 0}}, "q_proj must be a positive integer, got 0"),
            ({"alpha_pattern": {"q_proj": None, "*": 3}}, "keys must be names of modules"),
            ({"alpha_pattern": {r"\b": 3}}, "keys must be names of modules"),
            ({"alpha_pattern": {"a.*+": 3}}, "keys must be names of modules"),
            ({"alpha_pattern": {"x" * 201: 3}}, "of at most 200 characters"),
            ({"alpha_pattern": {"(a+)+": 3}}, "keys must be names of modules"),
            ({"alpha_pattern": {"(.|.)(.|.)": 3}}, "keys must be names of modules"),
            ({"alpha_pattern": {".*.*.*x": 3}}, "with * or + at most twice, got '.*.*.*x'"),
            ({"alpha_pattern": {"x{999}": 3}}, "keys must be names of modules"),
            ({"alpha_pattern": {"": 3}}, "keys must be names of modules"),
            (
                {"alpha_pattern": {f"x{i}": 3 for i in range(4097)}},
                "must have at most 4096 keys",
            ),
            ({"alpha_pattern": {f".*x{i}": 3 for i in range(65)}}, "64 of them with * or +"),
        ],
    )
    def test_other_adapters_are_refused(
        self, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            self.load(tmp_path, **changes)
        assert message in str(caught.value)
        assert "adapter_config.json" in str(caught.value) or "_pattern" in str(caught.value)

    def test_training_settings_are_ignored(self, tmp_path: Path) -> None:
        plain = self.load(tmp_path)
        said = {
            "auto_mapping": {"parent_library": "evil"}, "lora_dropout": 0.5, "inference_mode": True,
            "task_type": "CAUSAL_LM", "base_model_name_or_path": "/nowhere", "revision": "x",
            "peft_version": "99", "use_dora": False, "megatron_config": None, "loftq_config": {},
        }  # fmt: skip
        assert self.load(tmp_path, **said) == plain

    def test_missing_config_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"adapter_config\.json: cannot be read"):
            AdapterConfig.load(tmp_path)


class TestWeights:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        train(tmp_path, r=4, target_modules=["q_proj"])
        return tmp_path

    def refusal(self, base: Path, adapter: Path, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(base, adapter=adapter, **options)
        return str(caught.value)

    def change(self, adapter: Path, **tensors: torch.Tensor | None) -> None:
        """Replace or remove tensors in the file under ``Q_PROJ``."""
        file = adapter / "adapter_model.safetensors"
        content: dict[str, Any] = load_file(file)
        for name, tensor in tensors.items():
            content[f"{Q_PROJ}.{name.replace('__', '.')}"] = tensor
        save_file({k: t for k, t in content.items() if t is not None}, file)

    def test_pair_without_a_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, lora_A__weight=None)
        assert f"tensor '{Q_PROJ}.lora_A.weight' is missing" in self.refusal(base, adapter)

    def test_pair_without_b_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, lora_B__weight=None)
        assert f"tensor '{Q_PROJ}.lora_B.weight' is missing" in self.refusal(base, adapter)

    def test_other_rank_is_refused(self, base: Path, adapter: Path) -> None:
        edit(adapter, r=8)
        assert "with r = 8 as in adapter_config.json, got (4, 64)" in self.refusal(base, adapter)

    def test_adapter_of_another_model_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, lora_A__weight=torch.zeros(4, 63))
        said = self.refusal(base, adapter)
        assert "q_proj.weight' of shape (64, 64), got (64, 63)" in said

    def test_unknown_module_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, x__lora_A__weight=torch.ones(4, 2), x__lora_B__weight=torch.ones(2, 4))
        assert "q_proj.x.weight', which is not part of this model" in self.refusal(base, adapter)

    @pytest.mark.parametrize(
        "name", ["lora_magnitude_vector", "lora_A__default__weight", "lora_B__bias", "hada_w1_a"]
    )
    def test_tensors_beyond_plain_lora_are_refused(
        self, name: str, base: Path, adapter: Path
    ) -> None:
        self.change(adapter, **{name: torch.zeros(4)})
        assert "is no part of plain LoRA" in self.refusal(base, adapter)

    def test_magnitude_of_another_size_is_refused(self, base: Path, tmp_path: Path) -> None:
        train(tmp_path, r=4, target_modules=["q_proj"], use_dora=True)
        self.change(tmp_path, lora_magnitude_vector=torch.ones(1))
        said = self.refusal(base, tmp_path)
        assert "q_proj.weight' must have shape (64,), got (1,)" in said

    def test_dora_without_a_magnitude_is_refused(self, base: Path, tmp_path: Path) -> None:
        train(tmp_path, r=4, target_modules=["q_proj"], use_dora=True)
        self.change(tmp_path, lora_magnitude_vector=None)
        said = self.refusal(base, tmp_path)
        assert f"must hold a pair and a lora_magnitude_vector for '{Q_PROJ[17:]}.weight'" in said

    def test_magnitude_without_a_pair_is_refused(self, base: Path, tmp_path: Path) -> None:
        train(tmp_path, r=4, target_modules=["q_proj"], use_dora=True)
        self.change(tmp_path, lora_A__weight=None, lora_B__weight=None)
        assert "must hold a pair and a lora_magnitude_vector" in self.refusal(base, tmp_path)

    def test_other_prefix_is_refused(self, base: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file({name[5:]: tensor for name, tensor in load_file(file).items()}, file)
        assert "must begin with 'base_model.model.'" in self.refusal(base, adapter)

    def test_repeated_whole_tensor_is_refused(self, base: Path, adapter: Path) -> None:
        whole = torch.zeros(64, 64)
        self.change(adapter, weight=whole, base_layer__weight=whole.clone())
        assert "q_proj.weight' twice" in self.refusal(base, adapter)

    @pytest.mark.parametrize("quantization", [None, Quantization()], ids=["dense", "nf4"])
    @pytest.mark.parametrize("shape", [(1,), (), (64,), (1, 64), (64, 1), (64, 64, 1)], ids=str)
    def test_base_weight_of_another_shape_is_refused(
        self, shape: tuple[int, ...], quantization: Any, base: Path, adapter: Path
    ) -> None:
        """The sum would broadcast, and the model's own weight would be lost."""
        self.change(adapter, base_layer__weight=torch.ones(shape))
        said = self.refusal(base, adapter, check_finite=True, quantization=quantization)
        assert f"q_proj.weight' of shape (64, 64), got {shape}" in said

    def test_base_weight_beside_a_pair_is_used_as_in_peft(self, base: Path, adapter: Path) -> None:
        self.change(adapter, base_layer__weight=torch.full((64, 64), 0.5))
        model = load_checkpoint(base, adapter=adapter)
        name = "model.text_model.layers.0.self_attn.q_proj.weight"
        qkv: Any = dict(model.named_parameters())["text.layers.0.attention.qkv_proj.weight"]
        assert torch.equal(qkv[:64], load_in_peft(adapter).state_dict()[name])

    def test_module_as_weight_and_pair_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, weight=torch.zeros(64, 64))
        assert "q_proj.weight' without a pair for its module" in self.refusal(base, adapter)

    def test_base_weight_without_a_pair_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(
            adapter,
            base_layer__weight=torch.zeros(64, 64), lora_A__weight=None, lora_B__weight=None,
        )  # fmt: skip
        assert "q_proj.weight' with a pair for its module" in self.refusal(base, adapter)

    def test_two_pairs_for_one_module_are_refused(self, base: Path, adapter: Path) -> None:
        pair = {"lora_embedding_A": torch.ones(4, 64), "lora_embedding_B": torch.ones(64, 4)}
        self.change(adapter, **pair)
        assert "changes 'model.text_model.layers.0.self_attn.q_proj.weight' twice" in self.refusal(
            base, adapter
        )
        self.change(adapter, lora_A__weight=None, lora_B__weight=None)
        said = self.refusal(base, adapter)
        assert "must be changed by lora_A.weight, got '.lora_embedding_A'" in said

    def test_linear_pair_for_the_embedding_is_refused(self, base: Path, adapter: Path) -> None:
        rows, columns = 120, 64
        self.change(
            adapter,
            x__lora_A__weight=torch.ones(4, columns), x__lora_B__weight=torch.ones(rows, 4),
        )  # fmt: skip
        file = adapter / "adapter_model.safetensors"
        embedding = "base_model.model.model.text_model.embed_tokens"
        tensors = load_file(file).items()
        save_file({n.replace(f"{Q_PROJ}.x", embedding): t for n, t in tensors}, file)
        said = self.refusal(base, adapter)
        assert "embed_tokens.weight' must be changed by lora_embedding_A, got '.lora_A" in said

    def test_rank_of_zero_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, lora_A__weight=torch.ones(0, 64), lora_B__weight=torch.ones(64, 0))
        assert "with r = 4 as in adapter_config.json, got (0, 64)" in self.refusal(base, adapter)

    def test_incomplete_saved_module_is_refused(self, base: Path, tmp_path: Path) -> None:
        """PEFT fails as well; using the model's own connector would give wrong answers."""
        train(tmp_path, r=4, target_modules=["fc1"], modules_to_save=["connector"])
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors["base_model.model.model.connector.perceiver_resampler.latents"]
        save_file(tensors, file)
        with pytest.raises(KeyError, match="latents"):
            load_in_peft(tmp_path)
        said = self.refusal(base, tmp_path)
        assert "must hold 'model.connector.perceiver_resampler.latents', which is in" in said

    def test_patterns_are_matched_only_with_the_models_names(
        self, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        met: list[str] = []
        fits = NamePattern.fits

        def recording_fits(pattern: NamePattern, name: str) -> bool:
            met.append(name)
            return fits(pattern, name)

        monkeypatch.setattr(NamePattern, "fits", recording_fits)
        edit(adapter, alpha_pattern={".*.*b": 3}, rank_pattern={".*.*b": 3})
        load_checkpoint(base, adapter=adapter)
        own = {name.removesuffix(".weight") for name in load_file(base / "model.safetensors")}
        assert set(met) <= own
        assert met
        before = len(met)
        stranger = "a" * 8000
        self.change(
            adapter,
            **{f"{stranger}__lora_A__weight": torch.ones(4, 2)},
            **{f"{stranger}__lora_B__weight": torch.ones(2, 4)},
        )
        assert "which is not part of this model" in self.refusal(base, adapter)
        assert set(met[before:]) <= own

    def test_other_dtypes_are_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, lora_A__weight=torch.zeros(4, 64, dtype=torch.int8))
        assert "must be F64, F32, F16, BF16, got I8" in self.refusal(base, adapter)

    def test_values_that_are_not_finite_are_refused(self, base: Path, adapter: Path) -> None:
        self.change(adapter, lora_A__weight=torch.full((4, 64), math.nan))
        load_checkpoint(base, adapter=adapter)
        said = self.refusal(base, adapter, check_finite=True)
        assert f"'{Q_PROJ}.lora_A.weight' must be finite, got 256 values that are not" in said

    def test_sum_that_overflows_is_refused(self, base: Path, adapter: Path) -> None:
        self.change(
            adapter, lora_A__weight=torch.full((4, 64), 3e4), lora_B__weight=torch.ones(64, 4)
        )
        said = self.refusal(base, adapter, check_finite=True, dtype=torch.float16)
        assert "must be finite in torch.float16, got 4096 values that are not" in said

    def test_file_without_tensors_is_refused(self, base: Path, adapter: Path) -> None:
        save_file({}, adapter / "adapter_model.safetensors")
        assert "holds no tensors" in self.refusal(base, adapter)

    def test_missing_file_is_refused(self, base: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        assert self.refusal(base, adapter).endswith("holds no adapter_model.safetensors")

    def test_pickle_is_refused(self, base: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps({}))
        assert "only pickles (adapter_model.bin), which can run code" in self.refusal(base, adapter)

    def test_git_lfs_pointer_is_refused(self, base: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        assert f"{file}: is a Git LFS pointer" in self.refusal(base, adapter)

    def test_adapter_of_a_convolution_is_refused(self, base: Path, tmp_path: Path) -> None:
        train(tmp_path, r=4, target_modules=["patch_embedding"])
        assert "must be (r, in) and (out, r)" in self.refusal(base, tmp_path)

    @pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
    def test_half_of_a_tied_pair_is_refused(self, name: str, tmp_path: Path) -> None:
        folder = save_oracle(build_oracle(TIED), tmp_path / "base")
        train(tmp_path / "adapter", TIED, r=4, target_modules=["q_proj"], modules_to_save=[name])
        said = self.refusal(folder, tmp_path / "adapter")
        assert "changes the embedding or the head, which are one in this model" in said
