"""Patching: which modules call which operations, for one model alone, and when they do not."""

import copy
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

import idefics2_engine.hf
from hf_models import MIXED, batch, build_own, build_peer, counted, kept_logits
from idefics2_engine.hf import Idefics2ForConditionalGeneration, accelerate_model
from idefics2_kernels import REFERENCE, TRITON
from oracle import TinyCase

# Two layers of vision, two of the perceiver, three of text
FORWARD = {
    "layer_norm": 2 * 2 + 1,
    "gelu_tanh": 2,
    # The projection, the perceiver and the text model
    "silu_mul": 1 + 2 + 3,
    "rms_norm": 3 + 1 + 2 * 3 + 1,
    "add_rms_norm": 3,
    "flash_attention": 2 + 3,
    "perceiver_attention": 2,
    "rotary": 3,
}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def peer() -> Any:
    return build_peer(MIXED)


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class TestHooks:
    """Each would fail if a release of transformers moved what is patched (also ``test_hooks``)."""

    def test_a_forward_calls_every_operation(self, peer: Any) -> None:
        calls: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, calls))
        kept_logits(model, batch(MIXED))
        assert calls == FORWARD

    def test_decoding_calls_all_but_attention(self, peer: Any) -> None:
        calls: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, calls))
        with torch.no_grad():
            past = model(input_ids=torch.tensor([[5, 6]])).past_key_values
            calls.clear()
            model(input_ids=torch.tensor([[7]]), past_key_values=past)
        assert calls == {"silu_mul": 3, "rms_norm": 4, "add_rms_norm": 3, "rotary": 3}

    def test_rotary_angles_are_not_rounded(self) -> None:
        seen = []

        def look(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> Any:
            seen.append((q.dtype, cos_sin))
            return REFERENCE.rotary(q, k, positions, cos_sin)

        half = build_peer(MIXED, torch.bfloat16)
        model = accelerate_model(half, replace(REFERENCE, rotary=look))
        kept_logits(model, batch(MIXED))
        assert {q for q, _ in seen} == {torch.bfloat16}
        frequencies = model.model.text_model.rotary_emb.inv_freq.float()
        angles = torch.arange(3, 9)[:, None] * frequencies
        torch.testing.assert_close(seen[0][1][3:9], torch.cat([angles.cos(), angles.sin()], -1))

    def test_vision_and_projection_compute_no_padding(self, peer: Any) -> None:
        model = accelerate_model(copy.deepcopy(peer))
        rows = []
        for name in ("vision_model.encoder.layers.0.mlp.fc1", "connector.modality_projection"):
            model.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args: rows.append(args[0].shape[:-1].numel())
            )
        kept_logits(model, batch(MIXED))
        # 4 x 5, 8 x 2, 1 x 1 and 5 x 4 patches
        assert rows == [57, 57]


class TestOneModel:
    def test_other_models_are_unchanged(self, peer: Any) -> None:
        one = copy.deepcopy(peer)
        # A model may share its config with another
        other = transformers.Idefics2ForConditionalGeneration(one.config)
        before = kinds(other)
        assert accelerate_model(one) is one
        assert kinds(other) == before
        assert kinds(one) != before
        assert other.config._attn_implementation == "sdpa"
        assert other.model.text_model.config._attn_implementation == "sdpa"
        assert one.model.text_model.config is one.config.text_config
        assert one.config._attn_implementation == "idefics2"
        fresh = build_peer(MIXED)
        assert kinds(fresh) == kinds(peer)

    def test_twice_is_once_but_for_the_operations(self, peer: Any) -> None:
        first: Counter[str] = Counter()
        second: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, first))
        before, config = kinds(model), model.config
        accelerate_model(model, counted(REFERENCE, second))
        assert kinds(model) == before
        assert model.config is config
        kept_logits(model, batch(MIXED))
        assert not first
        assert second == FORWARD

    def test_a_copy_of_a_patched_model_is_patched(self, peer: Any) -> None:
        model = accelerate_model(copy.deepcopy(peer))
        wanted = kept_logits(model, batch(MIXED))
        copied = copy.deepcopy(model)
        assert kinds(copied) == kinds(model)
        model.lm_head.weight.data.zero_()
        assert torch.equal(kept_logits(copied, batch(MIXED)), wanted)

    def test_models_without_a_head_are_accepted(self, peer: Any) -> None:
        calls: Counter[str] = Counter()
        inner = accelerate_model(copy.deepcopy(peer).model, counted(REFERENCE, calls))
        with torch.no_grad():
            inner(**batch(MIXED))
        assert calls == FORWARD

    def test_other_modules_are_refused(self) -> None:
        with pytest.raises(TypeError, match="Idefics2Model, got Linear"):
            accelerate_model(nn.Linear(2, 2))

    def test_other_activations_are_transformers(self) -> None:
        case = TinyCase(
            "relu",
            MIXED.tiles,
            MIXED.text_lengths,
            vision={"hidden_act": "relu"},
            perceiver={"hidden_act": "gelu"},
            text={"hidden_act": "relu"},
        )
        calls: Counter[str] = Counter()
        other = build_peer(case)
        model = accelerate_model(copy.deepcopy(other), counted(REFERENCE, calls))
        torch.testing.assert_close(
            kept_logits(model, batch(case)), kept_logits(other, batch(case)), **CLOSE
        )
        assert calls == {k: n for k, n in FORWARD.items() if k not in ("gelu_tanh", "silu_mul")}

    def test_other_layer_norms_are_pytorchs(self, peer: Any) -> None:
        model, x = copy.deepcopy(peer), torch.randn(2, 3, 4)
        others = nn.LayerNorm((3, 4)), nn.LayerNorm(4, bias=False)
        model.others = nn.ModuleList(others)
        wanted = [norm(x) for norm in others]
        accelerate_model(model)
        with torch.no_grad():
            assert all(torch.equal(norm(x), y) for norm, y in zip(others, wanted, strict=True))

    def test_hooks_of_accelerate_stay(self, peer: Any) -> None:
        seen = []

        class Note(ModelHook):  # type: ignore[misc]
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                seen.append(module)
                return args, kwargs

        calls: Counter[str] = Counter()
        model = copy.deepcopy(peer)
        norm, gate = model.model.text_model.norm, model.model.text_model.layers[0].mlp.gate_proj
        for module in (norm, gate):
            add_hook_to_module(module, Note())
        accelerate_model(model, counted(REFERENCE, calls))
        wanted = kept_logits(peer, batch(MIXED))
        torch.testing.assert_close(kept_logits(model, batch(MIXED)), wanted, **CLOSE)
        assert seen == [gate, norm]
        assert calls == FORWARD


# PEFT asks for a name that the newest transformers warns of
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
class TestAdapters:
    def test_adapters_are_computed(self, peer: Any) -> None:
        config = peft.LoraConfig(
            r=2,
            target_modules=r".*(gate_proj|q_proj|k_proj|fc1|down_proj)",
            init_lora_weights=False,
        )
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(copy.deepcopy(peer), config).eval()
        wanted = kept_logits(wrapped, batch(MIXED))
        assert (wanted - kept_logits(peer, batch(MIXED))).abs().max() > 0.1
        calls: Counter[str] = Counter()
        accelerate_model(wrapped, counted(REFERENCE, calls))
        torch.testing.assert_close(kept_logits(wrapped, batch(MIXED)), wanted, **CLOSE)
        assert calls == FORWARD
        # The other order: PEFT finds the layers by their names
        torch.manual_seed(1)
        late = peft.get_peft_model(accelerate_model(copy.deepcopy(peer)), config).eval()
        torch.testing.assert_close(kept_logits(late, batch(MIXED)), wanted, **CLOSE)


class DoubledWeight(Tensor):
    """A weight that multiplies as no other does, as quantized ones do."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain: Any = super().__torch_function__
        out = plain(function, types, args, kwargs or {})
        return 2 * out if function is nn.functional.linear else out


@pytest.mark.parametrize("change", ["hook", "pre-hook", "bias", "weight"])
def test_layers_that_do_more_than_multiply_are_called(change: str, peer: Any) -> None:
    model = copy.deepcopy(peer)
    mlp = model.model.text_model.layers[0].mlp
    match change:
        case "hook":
            mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)
        case "pre-hook":
            mlp.gate_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        case "bias":
            mlp.up_proj = nn.Linear(64, 88)
        case _:
            doubled = mlp.gate_proj.weight.detach().as_subclass(DoubledWeight)
            mlp.gate_proj.weight = nn.Parameter(doubled)
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = mlp(x)
        assert not torch.allclose(wanted, peer.model.text_model.layers[0].mlp(x))
        accelerate_model(model)
        torch.testing.assert_close(mlp(x), wanted)


class TestGradients:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_equal_transformers(self, checkpointing: bool, peer: Any) -> None:
        inputs = batch(MIXED)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        models = copy.deepcopy(peer), build_own(peer, MIXED, TRITON)
        for model in models:
            model.train()
            if checkpointing:
                # The newest name first
                names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
                next(getattr(model, name) for name in names if hasattr(model, name))()
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        for (name, theirs), (_, ours) in zip(
            models[0].named_parameters(), models[1].named_parameters(), strict=True
        ):
            if theirs.grad is not None:
                assert torch.equal(ours.grad, theirs.grad), name

    def test_the_log_says_so_once(self, peer: Any, caplog: pytest.LogCaptureFixture) -> None:
        model = build_own(peer, MIXED)
        with caplog.at_level(logging.WARNING, "idefics2_engine.hf"):
            kept_logits(model, batch(MIXED))
            assert not caplog.messages
            for _ in range(2):
                model(**batch(MIXED))
        assert len(caplog.messages) == 1
        assert "needs gradients" in caplog.messages[0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "name",
        [
            "vision_model.encoder.layers.0.mlp.fc1",
            "vision_model.encoder.layers.1.self_attn.k_proj",
            "connector.modality_projection.up_proj",
            "connector.perceiver_resampler.layers.1.self_attn.v_proj",
            "text_model.layers.0.mlp.gate_proj",
            "text_model.layers.1.self_attn.q_proj",
        ],
    )
    def test_one_layer_is_trained(self, name: str, dtype: torch.dtype) -> None:
        """What is before it is computed here, with angles in fp32, and the rest by transformers."""
        theirs = build_peer(MIXED, dtype)
        calls: Counter[str] = Counter()
        models = theirs, build_own(theirs, MIXED, counted(REFERENCE, calls))
        for model in models:
            model.requires_grad_(False)
            model.model.get_submodule(name).weight.requires_grad_(True)
            model(**batch(MIXED), labels=batch(MIXED)["input_ids"]).loss.backward()
        assert calls
        wanted, got = (model.model.get_submodule(name).weight.grad for model in models)
        bound = 1e-4 if dtype is torch.float32 else 0.1
        assert (got - wanted).abs().max() <= bound * wanted.abs().max()

    def test_frozen_parts_are_computed_here(self, peer: Any) -> None:
        calls: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, calls))
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        model(**batch(MIXED), labels=batch(MIXED)["input_ids"]).loss.backward()
        assert calls == FORWARD
        assert model.lm_head.weight.grad.abs().max() > 0


class TestTransformersOwn:
    """Calls for which transformers' own operations run, with the result that they have there."""

    def test_autocast(self, peer: Any) -> None:
        calls: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, calls))
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = (kept_logits(m, batch(MIXED)) for m in (model, peer))
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1)
        # What products return is in autocast's dtype already, and the rest is transformers'
        assert calls == {"flash_attention": 2, "perceiver_attention": 2, "gelu_tanh": 2}

    def test_norms_of_another_dtype(self) -> None:
        peer = build_peer(MIXED, torch.bfloat16)
        for module in peer.modules():
            if "Norm" in type(module).__name__:
                module.float()
        calls: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, calls))
        norm, theirs = (m.model.text_model.norm for m in (model, peer))
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(norm(x), theirs(x))
        assert not calls

    def test_torch_compile(self, peer: Any) -> None:
        calls: Counter[str] = Counter()
        model = accelerate_model(copy.deepcopy(peer), counted(REFERENCE, calls))
        compile: Any = torch.compile
        compiled = compile(model.model.text_model.layers[0].mlp, backend="eager", fullgraph=True)
        x = torch.randn(3, 64)
        with torch.no_grad():
            assert torch.equal(compiled(x), peer.model.text_model.layers[0].mlp(x))
        assert not calls


class TestClass:
    def test_attention_has_transformers_names(self, tmp_path: Path) -> None:
        build_peer(MIXED).save_pretrained(tmp_path)
        load: Any = Idefics2ForConditionalGeneration.from_pretrained
        cases: list[tuple[dict[str, Any], list[str]]] = [
            ({}, ["idefics2"] * 2),
            ({"attn_implementation": "flash_attention_2"}, ["idefics2"] * 2),
            ({"attn_implementation": "sdpa"}, ["sdpa"] * 2),
            ({"attn_implementation": {"text_config": "eager"}}, ["idefics2", "eager"]),
        ]
        for given, wanted in cases:
            model, info = load(tmp_path, output_loading_info=True, **given)
            assert not info["missing_keys"]
            parts = model.model.vision_model, model.model.text_model
            assert [part.config._attn_implementation for part in parts] == wanted
        model.set_attn_implementation("flash_attention_2")
        assert model.model.text_model.config._attn_implementation == "idefics2"
        with pytest.raises(ImportError, match="FlashAttention3"):
            load(tmp_path, attn_implementation="flash_attention_3")

    def test_other_attention_keeps_the_other_operations(self, peer: Any) -> None:
        for name in ("sdpa", "eager"):
            calls: Counter[str] = Counter()
            model = build_own(peer, MIXED, counted(REFERENCE, calls))
            model.set_attn_implementation(name)
            got, wanted = (kept_logits(m, batch(MIXED)) for m in (model, peer))
            torch.testing.assert_close(got, wanted, **CLOSE)
            assert calls == {k: n for k, n in FORWARD.items() if "attention" not in k}

    def test_files_are_transformers(self, peer: Any, tmp_path: Path) -> None:
        own = build_own(peer, MIXED)
        assert list(own.state_dict()) == list(peer.state_dict())
        own.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == ["Idefics2ForConditionalGeneration"]
        assert "idefics2" not in [
            config.get("attn_implementation"),
            *config["text_config"].values(),
        ]
        again: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert type(again) is transformers.Idefics2ForConditionalGeneration
        for name, tensor in peer.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_missing_or_old_transformers_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value, wanted in (
            ("version", "5.16.2", r"5\.17 or newer, got 5\.16\.2.*pip install .\.\[transformers\]"),
            ("find_spec", None, r"got none.*pip install .\.\[transformers\]"),
        ):
            monkeypatch.setattr(idefics2_engine.hf, name, lambda _, value=value: value)
            with pytest.raises(ImportError, match=wanted):
                _ = idefics2_engine.hf.__getattr__("Idefics2Processor")
        with pytest.raises(AttributeError, match="nothing_else"):
            _ = idefics2_engine.hf.__getattr__("nothing_else")
