"""Steps of the text model as graphs, for which a function that computes them stands in on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_models import LOOPED, MIXED, batch, build_own, build_peer
from idefics2_engine.hf import decode_graph
from idefics2_engine.hf.paged_cache import PagedCache
from oracle import CASES, TinyCase

BY_NAME = {case.name: case for case in CASES}
# Grows beyond its first memory, with padding and a window that is left
LONG = TinyCase("long", (((28, 42),), ()), (20, 90), text={"sliding_window": 40})
NO_IMAGE = BY_NAME["no-image"]


class Captures:
    """Stands in for ``capture``: a replay computes the step anew on the same fixed tensors."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        output = step()

        def replay() -> None:
            self.replays += 1
            output.copy_(step())

        return replay, output


def looping(case: TinyCase, peer: Any) -> Any:
    """Return this package's class, which generates in transformers' loop."""
    own = build_own(peer, case)
    own.generation_backend = "transformers"
    return own


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures()
    monkeypatch.setattr(decode_graph, "capture", made)
    monkeypatch.setattr(decode_graph, "has_graphs", lambda _device: True)
    return made


@pytest.mark.parametrize(
    ("case", "graphs"),
    [
        (MIXED, 1),
        (LONG, 2),
        (NO_IMAGE, 1),
        (BY_NAME["no-window"], 1),
        (BY_NAME["row-without-image"], 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tokens_equal_transformers(case: TinyCase, graphs: int, captures: Captures) -> None:
    inputs, peer = batch(case), build_peer(case)
    settings = LOOPED | {"max_new_tokens": 110 if graphs > 1 else 30}
    wanted = peer.generate(**inputs, **settings)
    assert torch.equal(looping(case, peer).generate(**inputs, **settings), wanted)
    # Each memory that is kept for a while has one
    assert captures.captures == graphs
    assert captures.replays > 20


def test_short_answers_have_no_graph(captures: Captures) -> None:
    own = looping(NO_IMAGE, build_peer(NO_IMAGE))
    own.generate(**batch(NO_IMAGE), **LOOPED | {"max_new_tokens": 4})
    assert captures.captures == 0


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_other_loops_answer_the_same(how: dict[str, Any], captures: Captures) -> None:
    peer = build_peer(NO_IMAGE)
    inputs = {name: tensor[:1] for name, tensor in batch(NO_IMAGE).items()}
    settings = LOOPED | {"max_new_tokens": 20} | how
    wanted = peer.generate(**inputs, **settings)
    assert torch.equal(looping(NO_IMAGE, peer).generate(**inputs, **settings), wanted)


def decode(own: Any, inputs: dict[str, Tensor], steps: int, cache: Any) -> Tensor:
    """Return the logits (steps, B, vocabulary) of equal tokens behind ``inputs``."""
    mask, logits = inputs["attention_mask"], []
    with torch.no_grad():
        own(**inputs, past_key_values=cache)
        for _ in range(steps):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.sum(1, keepdim=True) - 1
            out = own(
                input_ids=torch.full_like(mask[:, :1], 7),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.fixture
def own() -> Any:
    return looping(NO_IMAGE, build_peer(NO_IMAGE))


def test_a_hook_sees_every_step(own: Any, captures: Captures) -> None:
    seen = []
    layer = own.model.text_model.layers[0].mlp
    layer.register_forward_hook(lambda *_: seen.append(1))
    decode(own, batch(NO_IMAGE), 8, PagedCache(own.config))
    assert (len(seen), captures.replays) == (9, 0)


def test_other_parameters_have_another_graph(
    own: Any, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, logits = own.model.text_model.layers[0].mlp.down_proj, []
    first = layer.weight
    for has_graphs in (True, False):
        monkeypatch.setattr(decode_graph, "has_graphs", lambda _device, has=has_graphs: has)
        layer.weight = first
        cache = PagedCache(own.config)
        decode(own, batch(NO_IMAGE), 8, cache)
        layer.weight = nn.Parameter(first.detach() * 2)
        B = len(batch(NO_IMAGE)["input_ids"])
        places = torch.full((B, 1), 40)
        with torch.no_grad():
            ids = torch.full_like(places, 7)
            out = own(input_ids=ids, position_ids=places, past_key_values=cache)
        logits.append(out.logits)
    assert captures.captures == 2
    assert torch.equal(*logits)


def test_states_that_are_asked_for_are_returned(own: Any, captures: Captures) -> None:
    inputs = batch(NO_IMAGE)
    settings = LOOPED | {"max_new_tokens": 10, "return_dict_in_generate": True}
    out = own.generate(**inputs, **settings, output_hidden_states=True)
    assert len(out.hidden_states) == 10
    assert captures.replays == 0
    # The hooks that transformers leaves behind do nothing now
    again = own.generate(**inputs, **settings)
    assert torch.equal(again.sequences, out.sequences)
    assert captures.captures == 1


def test_padding_behind_a_kept_token_is_not_attended_to(
    own: Any, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, logits = batch(NO_IMAGE), []
    mask = nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
    mask[:, -3] = 0
    step = {"input_ids": torch.full_like(mask[:, :1], 7), "attention_mask": mask}
    for has_graphs in (True, False):
        monkeypatch.setattr(decode_graph, "has_graphs", lambda _device, has=has_graphs: has)
        cache = PagedCache(own.config)
        decode(own, inputs, 8, cache)
        before = captures.replays
        positions = mask.sum(1, keepdim=True) - 1
        with torch.no_grad():
            logits.append(own(**step, position_ids=positions, past_key_values=cache).logits)
        assert captures.replays == before
    assert torch.equal(*logits)


def test_a_graph_computes_what_steps_compute(
    own: Any, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = decode(own, batch(NO_IMAGE), 12, PagedCache(own.config))
    assert captures.replays > 5
    monkeypatch.setattr(decode_graph, "has_graphs", lambda _device: False)
    assert torch.equal(got, decode(own, batch(NO_IMAGE), 12, PagedCache(own.config)))
