"""Agreement of two implementations: what is counted, and a wrong operation that shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from idefics2_engine.agreement.answer_comparison import compare_answers
from idefics2_engine.agreement.logits import compare_logits
from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.images.tiling import ImageConfig, Tile, make_tiles
from idefics2_engine.model.batch import ImageBatch, TextBatch
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.quantization import Quantization
from idefics2_kernels import REFERENCE, TRITON, NF4Weight, Ops
from oracle import GRID, PATCH
from pictures import noise
from tiny_checkpoint import IMAGE, LATENTS

CONFIG = ImageConfig(70, 28, False, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Idefics2:
    return load_checkpoint(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiles() -> list[Tile]:
    pictures = [noise(60, 90), noise(112, 70)]
    return [tile for one in pictures for tile in make_tiles(one, CONFIG, PATCH, GRID)]


def test_logits_agreement_kl_and_margin() -> None:
    a = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.1, -9.0]])
    b = torch.tensor([[2.0, 1.0, 0.0], [0.3, 0.1, -9.0]])
    found = compare_logits(a, b)
    assert found.agrees.tolist() == [True, False]
    assert found.margins.tolist() == pytest.approx([0.0, 0.2])
    p, q = a[1].double().softmax(-1), b[1].double().softmax(-1)
    assert found.kl.tolist() == pytest.approx([0.0, float((p * (p / q).log()).sum())])
    # The yardstick says by how much one token is better
    yardstick = torch.tensor([[0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    assert compare_logits(a, b, yardstick).margins.tolist() == [0.0, 4.0]


def test_counts_are_added_and_largest_values_kept() -> None:
    total = TokenAgreement()
    assert (total.top1_agreement, total.mean_kl, total.greedy_agreement) == (None, None, None)
    total.add(TokenAgreement(3, 2, 1, 0.5, 0.4, 0.1, 2, 1, 0.3))
    total.add(TokenAgreement(1, 1, 0, 0.25, 0.25, 0.2, 2, 2, 0.1))
    assert total == TokenAgreement(4, 3, 1, 0.75, 0.4, 0.2, 4, 3, 0.3)
    assert (total.top1_agreement, total.mean_kl, total.greedy_agreement) == (0.75, 0.25, 0.75)
    assert TokenAgreement(**total.to_dict()) == total


def prompt(tiles: list[Tile]) -> list[int]:
    return [1, *[5, *[IMAGE] * LATENTS] * len(tiles), 77, 78]


def compare(a: Idefics2, b: Idefics2, tiles: list[Tile], **options: Any) -> TokenAgreement:
    return compare_answers(
        (a, b),
        prompt(tiles),
        tiles,
        [[9, 8, 7], [100]],
        image_config=CONFIG,
        **{"is_greedy": False} | options,
    )


def test_model_agrees_with_itself(model: Idefics2, tiles: list[Tile]) -> None:
    assert compare(model, model.with_ops(REFERENCE), tiles) == TokenAgreement(tokens=4, same_best=4)


@torch.no_grad()
def test_tokens_are_those_that_follow_in_one_pass(model: Idefics2, tiles: list[Tile]) -> None:
    """The divergence is that of logits which were computed here, over all tiles at once."""
    other = model.with_ops(replace(REFERENCE, rms_norm=half_rms_norm))
    logits = []
    for one in (model, other):
        features = one.image_features(ImageBatch.from_tiles(tiles, CONFIG))
        rows = one(TextBatch.from_ids([[*prompt(tiles), 9, 8]]), features)
        logits.append(rows[-3:])
    wanted = compare_logits(*logits)
    found = compare_answers(
        (model, other), prompt(tiles), tiles, [[9, 8, 7]], image_config=CONFIG, is_greedy=False
    )
    assert found.total_kl == pytest.approx(float(wanted.kl.sum()), rel=1e-4)
    assert found.largest_kl == pytest.approx(float(wanted.kl.max()), rel=1e-4)
    assert found.same_best == int(wanted.agrees.sum())


def half_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return 0.5 * REFERENCE.rms_norm(x, weight, eps)


def gelu_by_erf(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.gelu(REFERENCE.linear(x, weight, bias))


def attention_of_other_scale(*args: Any, **options: Any) -> Tensor:
    return REFERENCE.flash_attention(*args, **{**options, "scale": 0.1})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rms_norm", half_rms_norm),
        ("linear_gelu", gelu_by_erf),
        ("flash_attention", attention_of_other_scale),
    ],
)
def test_wrong_operation_shows(
    name: str, wrong: Callable[..., Tensor], model: Idefics2, tiles: list[Tile]
) -> None:
    ops: Any = {name: wrong}
    found = compare(model.with_ops(replace(REFERENCE, **ops)), model, tiles)
    assert found.largest_kl > 1e-9


@pytest.mark.long
def test_kernels_agree_with_the_reference(model: Idefics2, tiles: list[Tile]) -> None:
    found = compare(model.with_ops(TRITON), model, tiles)
    assert (found.tokens, found.not_finite) == (4, 0)
    assert 0 < found.largest_kl < 1e-9


def test_logits_that_are_not_finite_are_counted(model: Idefics2, tiles: list[Tile]) -> None:
    broken = replace(REFERENCE, rms_norm=lambda x, weight, eps: x * torch.nan)
    found = compare(model.with_ops(broken), model, tiles, is_greedy=True)
    assert (found.tokens, found.same_best, found.not_finite) == (4, 0, 4)
    assert found.mean_kl is None
    # Greedy tokens are looked up in the other model, and that is right
    assert found.greedy_tokens == 4


@torch.no_grad()
def test_greedy_tokens_are_the_best_that_are_not_barred(model: Idefics2) -> None:
    ids = [1, 77, 78]
    best: list[int] = []
    for _ in range(3):
        logits = model(TextBatch.from_ids([ids + best]))[-1]
        best.append(int(logits.argmax()))
    barred = [best[0]]
    second = int(logits_without(model, ids, barred).argmax())

    def found(answer: list[int], barred: list[int]) -> TokenAgreement:
        return compare_answers(
            (model, model), ids, [], [answer], image_config=CONFIG, is_greedy=True, barred=barred
        )

    right = found(best, [])
    assert (right.greedy_tokens, right.greedy_best, right.greedy_margin) == (3, 3, 0.0)
    wrong = found([second], [])
    assert (wrong.greedy_tokens, wrong.greedy_best) == (1, 0)
    assert wrong.greedy_margin > 0
    assert found([second], barred).greedy_best == 1


def logits_without(model: Idefics2, ids: list[int], barred: list[int]) -> Tensor:
    logits: Tensor = model(TextBatch.from_ids([ids]))[-1].clone()
    logits[barred] = -torch.inf
    return logits


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_other_operations_share_the_weights(checkpoint: Path, quantization: str | None) -> None:
    loaded = load_checkpoint(
        checkpoint,
        TRITON,
        dtype=torch.float32,
        quantization=Quantization.from_arguments(quantization, None, True),
    )
    twin = loaded.with_ops(REFERENCE)
    pairs = list(zip(loaded.modules(), twin.modules(), strict=True))
    assert {ops(two) for _, two in pairs} - {None} == {REFERENCE}
    assert {ops(one) for one, _ in pairs} - {None} == {TRITON}
    for (_, one), (_, two) in zip(loaded.named_parameters(), twin.named_parameters(), strict=True):
        assert one is two
    weights = [
        (value, vars(two)[name])
        for one, two in pairs
        for name, value in vars(one).items()
        if isinstance(value, NF4Weight)
    ]
    assert bool(weights) == (quantization is not None)
    assert all(one is two for one, two in weights)
    assert twin.num_bytes == loaded.num_bytes


def ops(module: torch.nn.Module) -> Ops | None:
    found: Any = getattr(module, "ops", None)
    return found if isinstance(found, Ops) else None


def test_values_are_those_of_numbers(model: Idefics2, tiles: list[Tile]) -> None:
    """What is stored is JSON data."""
    data = compare(model, model, tiles).to_dict()
    assert {type(value) for value in data.values()} <= {int, float}
    assert all(np.isfinite(list(data.values())))
