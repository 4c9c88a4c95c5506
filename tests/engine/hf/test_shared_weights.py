"""One memory for the weights of the class and of its engine."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from hf_models import MIXED, batch, build_own, build_peer
from idefics2_engine.hf import Idefics2ForConditionalGeneration
from idefics2_engine.hf.shared_weights import (
    NotShareableError,
    SharedWeights,
    config_of,
    model_on,
    views,
)
from idefics2_kernels import REFERENCE
from oracle import TinyCase

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
TIED = TinyCase("tied-head", (((56, 70),),), (9,), tied=True)


@pytest.fixture(scope="module")
def peer() -> Any:
    return build_peer(MIXED)


@pytest.fixture
def own(peer: Any) -> Any:
    model = build_own(peer, MIXED)
    model.generation_backend = "engine"
    return model


def storages(*modules: nn.Module) -> dict[int, int]:
    """Return the bytes of each memory that the parameters are in."""
    found = {}
    for module in modules:
        for parameter in module.parameters():
            storage = parameter.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def packed_of(model: Any) -> Any:
    return model.engine.engine.runner.model


@pytest.mark.parametrize("case", [MIXED, TIED], ids=lambda case: case.name)
def test_no_weight_is_there_twice(case: TinyCase) -> None:
    peer = build_peer(case)
    own = build_own(peer, case)
    own.generation_backend = "engine"
    parameters = dict(own.named_parameters())
    own.generate(**batch(case), **GREEDY)
    packed = packed_of(own)
    assert storages(own) == storages(packed)
    # The vocabulary is padded to a multiple of 64 rows
    assert sum(storages(own).values()) == packed.num_bytes
    # An optimizer that was made before has the same parameters
    after = dict(own.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    for name, tensor in peer.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name


def test_fusing_again_copies_nothing(own: Any) -> None:
    config = config_of(own)
    first = SharedWeights(own, config, REFERENCE)
    places = {name: p.data_ptr() for name, p in own.named_parameters()}
    second = SharedWeights(own, config, REFERENCE)
    assert places == {name: p.data_ptr() for name, p in own.named_parameters()}
    assert storages(first.packed) == storages(second.packed)
    assert first.is_current(own, config, REFERENCE)


def test_a_step_of_an_optimizer_is_seen(own: Any, peer: Any) -> None:
    own.generate(**batch(MIXED), **GREEDY)
    engine = own.engine.engine
    other = copy.deepcopy(peer)
    for model in (own, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        inputs = batch(MIXED)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    wanted = other.generate(**batch(MIXED), **GREEDY).tolist()
    assert wanted != peer.generate(**batch(MIXED), **GREEDY).tolist()
    assert own.generate(**batch(MIXED), **GREEDY).tolist() == wanted
    assert own.engine.engine is engine


def test_new_weights_are_seen(own: Any, peer: Any) -> None:
    own.generate(**batch(MIXED), **GREEDY)
    other = copy.deepcopy(peer)
    layer = "model.text_model.layers.1.mlp.gate_proj"
    with torch.no_grad():
        new = torch.randn_like(other.get_submodule(layer).weight)
    for model in (own, other):
        model.get_submodule(layer).weight = nn.Parameter(new.clone())
    wanted = other.generate(**batch(MIXED), **GREEDY).tolist()
    assert own.generate(**batch(MIXED), **GREEDY).tolist() == wanted


def test_moves_let_go_of_the_memory_and_views_are_made_anew(own: Any, peer: Any) -> None:
    own.generate(**batch(MIXED), **GREEDY)
    own.to(torch.float64)
    assert own.engine.engine is None
    own.to(torch.float32)
    wanted = peer.generate(**batch(MIXED), **GREEDY).tolist()
    assert own.generate(**batch(MIXED), **GREEDY).tolist() == wanted
    assert storages(own) == storages(packed_of(own))


def test_files_are_those_of_a_model_without_views(own: Any, peer: Any, tmp_path: Path) -> None:
    own.generate(**batch(MIXED), **GREEDY)
    own.save_pretrained(tmp_path / "own")
    peer.save_pretrained(tmp_path / "peer")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "peer"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    sizes = {(tmp_path / name / "model.safetensors").stat().st_size for name in ("own", "peer")}
    assert len(sizes) == 1
    load: Any = Idefics2ForConditionalGeneration.from_pretrained
    again = load(tmp_path / "own")
    again.generation_config = peer.generation_config
    wanted = peer.generate(**batch(MIXED), **GREEDY).tolist()
    assert again.generate(**batch(MIXED), **GREEDY).tolist() == wanted


def test_shards_and_state_dicts(own: Any, tmp_path: Path) -> None:
    own.generate(**batch(MIXED), **GREEDY)
    own.save_pretrained(tmp_path, max_shard_size="100KB")
    library: Any = transformers.Idefics2ForConditionalGeneration
    again = library.from_pretrained(tmp_path)
    torch.save(own.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    for name, tensor in own.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(state[name], tensor)


def test_a_copy_has_weights_and_an_engine_of_its_own(own: Any, peer: Any) -> None:
    own.generate(**batch(MIXED), **GREEDY)
    twin = copy.deepcopy(own)
    assert twin.engine is not own.engine
    assert not storages(twin).keys() & storages(own).keys()
    wanted = peer.generate(**batch(MIXED), **GREEDY).tolist()
    assert twin.generate(**batch(MIXED), **GREEDY).tolist() == wanted


def test_fused_gates_are_one_product(own: Any) -> None:
    with torch.no_grad():
        before = own(**batch(MIXED)).logits
        SharedWeights(own, config_of(own), REFERENCE)
        torch.testing.assert_close(own(**batch(MIXED)).logits, before)


def test_a_model_of_transformers_on_the_engines_weights(own: Any, peer: Any) -> None:
    packed = SharedWeights(own, config_of(own), REFERENCE).packed
    library: Any = transformers.Idefics2ForConditionalGeneration
    other = model_on(packed, library, peer.config, attn_implementation="sdpa")
    assert storages(other) == storages(packed)
    with torch.no_grad():
        wanted, got = peer(**batch(MIXED)).logits, other(**batch(MIXED)).logits
    assert torch.equal(got, wanted)
    names = [name for name, _ in views(packed)]
    assert sorted(names) == sorted(name for name, _ in peer.named_parameters())


@pytest.mark.parametrize("change", ["dtype", "kind", "shape"])
def test_other_weights_are_named(change: str, own: Any) -> None:
    layer = own.model.text_model.layers[0].mlp.down_proj
    if change == "dtype":
        layer.to(torch.float64)
    elif change == "kind":
        layer.weight = Strange(layer.weight.data)
    else:
        layer.weight = nn.Parameter(layer.weight.data[:-1].clone())
    with pytest.raises(NotShareableError, match=r"layers\.0\.mlp\.down_proj"):
        SharedWeights(own, config_of(own), REFERENCE)


class Strange(nn.Parameter):
    """A weight of a quantized or distributed kind."""
