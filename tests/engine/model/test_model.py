"""The reference path against transformers, with the same weights and dtype, stage by stage."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.tensor_mapping import hub_tensors
from idefics2_engine.errors import ConfigError
from idefics2_engine.hf.padded_forward import forward_padded
from idefics2_engine.model.batch import TextBatch
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.parity.recording.our_stages import our_taps
from idefics2_engine.parity.recording.recorder import Recorder
from idefics2_engine.parity.recording.transformers_stages import tile_rows, transformers_taps
from idefics2_engine.parity.stages import unit
from idefics2_engine.prompts.processor import Processor
from idefics2_kernels import (
    REFERENCE,
    REFERENCE_GRADIENTS,
    TRITON,
    TRITON_GRADIENTS,
    Ops,
    differentiable,
)
from oracle import (
    CASES,
    TinyCase,
    build_oracle,
    image_batch,
    oracle_inputs,
    padded_ids,
    save_oracle,
)
from tiny_checkpoint import write_checkpoint

RELATIVE = 1e-5


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference divided by the largest magnitude."""
    assert ours.shape == theirs.shape
    if ours.numel() == 0:
        return 0.0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def make_pair(
    case: TinyCase, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, Idefics2]:
    oracle = build_oracle(case, dtype)
    return oracle, load_checkpoint(save_oracle(oracle, folder), dtype=dtype)


def make_labels(inputs: dict[str, Tensor], image_token: int) -> Tensor:
    ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == image_token)
    return inputs["input_ids"].masked_fill(ignored, -100)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_stages_and_logits(case: TinyCase, tmp_path: Path) -> None:
    oracle, model = make_pair(case, tmp_path)
    inputs = oracle_inputs(case)
    mine, theirs = Recorder(our_taps(model)), Recorder(transformers_taps(oracle))
    with torch.no_grad(), mine.recording() as stages, theirs.recording() as their_stages:
        expected = oracle(**inputs)
        images = image_batch(case.make_tiles())
        features = None if images is None else model.image_features(images)
        logits = model(TextBatch.from_ids(case.token_ids()), features)

    kept = inputs["attention_mask"].bool()
    assert relative_error(logits, expected.logits[kept]) < RELATIVE
    assert stages.keys() == their_stages.keys()
    for stage, (tensor,) in stages.items():
        if unit(stage) == "token":
            assert relative_error(tensor, their_stages[stage][0][kept]) < RELATIVE, stage
    if images is None:
        return
    assert features is not None
    assert relative_error(features.flatten(0, 1), expected.image_hidden_states) < RELATIVE
    counts = images.cu_seqlens.diff().tolist()
    widths = images.widths.tolist()
    grids = [(count // width, width) for count, width in zip(counts, widths, strict=True)]
    columns = max(w for s in case.tiles for _, w in s) // 14
    for stage, (tensor,) in stages.items():
        (their,) = their_stages[stage]
        if unit(stage) == "latent":
            assert relative_error(tensor, their.view(tensor.shape)) < RELATIVE, stage
        if unit(stage) == "patch":
            rows = tile_rows(their, grids, columns)
            for own, other in zip(tensor.split(counts), rows, strict=True):
                assert relative_error(own, other) < RELATIVE, stage


@pytest.mark.parametrize(
    "ops",
    [REFERENCE, differentiable(REFERENCE, REFERENCE_GRADIENTS)],
    ids=["autograd", "gradients"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_loss_and_gradients(case: TinyCase, ops: Ops, tmp_path: Path) -> None:
    check_gradients(case, ops, tmp_path)


def test_loss_and_gradients_of_the_kernels(tmp_path: Path) -> None:
    # The perceiver's gradient has no kernel
    gradients = replace(
        TRITON_GRADIENTS, perceiver_attention=REFERENCE_GRADIENTS.perceiver_attention
    )
    case = next(case for case in CASES if case.name == "row-without-image")
    check_gradients(case, differentiable(TRITON, gradients), tmp_path)


def check_gradients(case: TinyCase, ops: Ops, tmp_path: Path) -> None:
    """Compare the gradient of each parameter with transformers', both against float64."""
    oracle, model = make_pair(case, tmp_path)
    model = model.with_ops(ops)
    inputs = oracle_inputs(case)
    labels = make_labels(inputs, model.config.image_token_id)
    expected = oracle(**inputs, labels=labels).loss

    truth = load_checkpoint(tmp_path, dtype=torch.float64)
    loss = forward_padded(model, **inputs, labels=labels).loss
    exact_loss = forward_padded(truth, **inputs, labels=labels).loss
    assert loss is not None
    assert exact_loss is not None
    assert abs(loss.item() - expected.item()) < RELATIVE * expected.item()
    torch.autograd.backward([expected, loss, exact_loss])

    theirs = dict(oracle.named_parameters())
    ours, exact = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, truth))
    for name, parameter in exact.items():
        places = [place for place in hub_tensors(model.config) if place.parameter == name]
        grads = [theirs[place.name].grad for place in places]
        # A tied head is the embedding
        if not places:
            continue
        if all(grad is None for grad in grads):
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        # The error is relative to a whole fused parameter. The gradient of a key bias is rounding
        # alone, unlike those of query and value.
        mine, true = ours[name].grad, parameter.grad
        assert mine is not None, name
        assert true is not None, name
        scale = true.abs().max()
        want = torch.cat([grad.reshape(-1, *parameter.shape[1:]) for grad in grads])
        got, true = mine[: want.shape[0]], true[: want.shape[0]]
        assert (got - true).abs().max() <= RELATIVE * scale, name
        their_error = (want - true).abs().max()
        assert (got - want).abs().max() <= RELATIVE * scale + their_error, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.name == "mixed-batch")
    # The half type represents these weights exactly, so all three models are the same
    oracle = build_oracle(case, dtype)
    folder = save_oracle(oracle, tmp_path)
    inputs = oracle_inputs(case)
    with torch.no_grad():
        theirs = oracle(**inputs).logits.double()
        ours = forward_padded(load_checkpoint(folder, dtype=dtype), **inputs).logits.double()
        exact = forward_padded(load_checkpoint(folder, dtype=torch.float64), **inputs).logits
    kept = inputs["attention_mask"].bool()
    theirs, ours, exact = theirs[kept], ours[kept], exact[kept]
    floor = torch.finfo(dtype).eps * exact.abs().amax(-1)
    budget = 2 * ((theirs - exact).abs().amax(-1) + floor)
    assert ((ours - exact).abs().amax(-1) <= budget).all()


def test_padding_side_and_reused_features_change_nothing(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mixed-batch")
    _, model = make_pair(case, tmp_path)
    inputs = oracle_inputs(case)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        right = forward_padded(model, **inputs)
        left_ids, left_mask = padded_ids(case, "left")
        left = forward_padded(model, left_ids, left_mask, image_features=right.image_features)
        packed = model(
            replace(TextBatch.from_ids(case.token_ids()), logits_indices=torch.tensor([3, 0, 20])),
            right.image_features,
        )
    assert torch.equal(left.logits[left_mask.bool()], right.logits[kept])
    assert relative_error(packed, right.logits[kept][[3, 0, 20]]) < 1e-6


def test_batch_equals_single_samples(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mixed-batch")
    _, model = make_pair(case, tmp_path)
    tiles, ids = case.make_tiles(), case.token_ids()
    with torch.no_grad():
        images = image_batch(tiles)
        assert images is not None
        together = model(TextBatch.from_ids(ids), model.image_features(images))
        alone = []
        for sample_tiles, sample_ids in zip(tiles, ids, strict=True):
            batch = image_batch([sample_tiles])
            assert batch is not None
            alone.append(model(TextBatch.from_ids([sample_ids]), model.image_features(batch)))
    assert relative_error(together, torch.cat(alone)) < 1e-6


def test_seed_determines_random_weights(tmp_path: Path) -> None:
    _, model = make_pair(CASES[0], tmp_path)
    first, again, other = (Idefics2(model.config) for _ in range(3))
    first.init_weights(1)
    again.init_weights(1)
    other.init_weights(2)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.lm_head, other.lm_head)
    latents = first.connector.perceiver.latents
    assert latents.std(0).min() > 0.1, "equal latents would never part"
    assert not first.lm_head[model.config.text.vocab_size :].any()


def test_number_of_image_tokens_must_equal_number_of_features(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mixed-batch")
    _, model = make_pair(case, tmp_path)
    inputs = oracle_inputs(case)
    # This cuts an image's tokens
    inputs["attention_mask"][0, :3] = 0
    with pytest.raises(ValueError, match="wanted 20, got 18"):
        forward_padded(model, **inputs)
    inputs["pixel_attention_mask"].zero_()
    with pytest.raises(ValueError, match="whole patch of some image"):
        forward_padded(model, **inputs)


Change = Callable[[dict[str, Tensor]], object]

WRONG: dict[str, tuple[Change, str]] = {
    "padding row": (
        lambda i: i["input_ids"].__setitem__((1, 2), 99),
        "input_ids must be from 0 to 98, got 99",
    ),
    "last padding row": (
        lambda i: i["input_ids"].__setitem__((1, 2), 127),
        "input_ids must be from 0 to 98, got 127",
    ),
    "negative": (
        lambda i: i["input_ids"].__setitem__((0, 0), -1),
        "input_ids must be from 0 to 98, got -1",
    ),
    "floats": (lambda i: i.update(input_ids=i["input_ids"].float()), "must be whole numbers"),
    "one row": (lambda i: i.update(input_ids=i["input_ids"][0]), "must be whole numbers (B, S)"),
    "hole": (
        lambda i: i["attention_mask"].__setitem__((1, 20), 0),
        "must keep one run of tokens in each row, with padding on its sides alone, got 2 runs in row 1",
    ),
    "nothing kept": (lambda i: i["attention_mask"][2].zero_(), "got 0 runs in row 2"),
    "mask's shape": (
        lambda i: i.update(attention_mask=i["attention_mask"][:, 1:]),
        "attention_mask must have the shape of input_ids (3, 27), got (3, 26)",
    ),
    "labels' shape": (
        lambda i: i.update(labels=i["labels"][:, :-1]),
        "labels must have the shape of input_ids (3, 27), got (3, 26)",
    ),
    "label": (
        lambda i: i["labels"].__setitem__((1, 3), 99),
        "labels must be from 0 to 98, or -100, got 99",
    ),
    "negative label": (lambda i: i["labels"].__setitem__((1, 3), -1), "or -100, got -1"),
    "corner of an image": (
        lambda i: i["pixel_attention_mask"][0, 0, :14, :14].zero_(),
        "must keep a rectangle of patches from the top left corner",
    ),
    "edge of an image": (
        lambda i: i["pixel_attention_mask"][0, 0, :14].zero_(),
        "must keep a rectangle of patches from the top left corner",
    ),
    "pixels' mask's shape": (
        lambda i: i.update(pixel_attention_mask=i["pixel_attention_mask"][:, :, 1:]),
        "pixel_attention_mask must be (3, 2, 112, 70) for these pixel_values, got (3, 2, 111, 70)",
    ),
    "pixels' shape": (
        lambda i: i.update(pixel_values=i["pixel_values"][0]),
        "pixel_values must be (B, images, 3, height, width), got (2, 3, 112, 70)",
    ),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyCase, Any, Idefics2]:
    case = next(c for c in CASES if c.name == "mixed-batch")
    return case, *make_pair(case, tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("name", WRONG)
def test_invalid_padded_batches_are_refused(
    name: str, mixed: tuple[TinyCase, Any, Idefics2]
) -> None:
    case, _, model = mixed
    inputs = oracle_inputs(case)
    inputs["labels"] = make_labels(inputs, model.config.image_token_id)
    change, message = WRONG[name]
    change(inputs)
    with pytest.raises(ValueError, match=re.escape(message)):
        forward_padded(model, **inputs)


def test_values_at_padding_are_ignored(mixed: tuple[TinyCase, Any, Idefics2]) -> None:
    case, _, model = mixed
    inputs = oracle_inputs(case)
    inputs["labels"] = make_labels(inputs, model.config.image_token_id)
    wanted = forward_padded(model, **inputs)
    padding = inputs["attention_mask"] == 0
    inputs["input_ids"][padding] = -5
    inputs["labels"][padding] = 12345
    got = forward_padded(model, **inputs)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)  # type: ignore[arg-type]


def test_loss_of_rows_padded_on_the_left(mixed: tuple[TinyCase, Any, Idefics2]) -> None:
    """transformers predicts each row's first token from padding, unless its label is -100."""
    case, oracle, model = mixed
    inputs = oracle_inputs(case)
    inputs["input_ids"], inputs["attention_mask"] = padded_ids(case, "left")
    labels = make_labels(inputs, model.config.image_token_id)
    ours = forward_padded(model, **inputs, labels=labels).loss
    first = inputs["attention_mask"].diff(dim=1, prepend=torch.zeros(3, 1, dtype=torch.int64)) == 1
    with torch.no_grad():
        counted = oracle(**inputs, labels=labels).loss
        theirs = oracle(**inputs, labels=labels.masked_fill(first, -100)).loss
    assert ours is not None
    assert abs(ours.item() - theirs.item()) < RELATIVE * theirs.item()
    assert abs(ours.item() - counted.item()) > 100 * RELATIVE * counted.item()


@pytest.mark.parametrize("with_mask", [False, True])
def test_images_of_zeros_count_as_absent(with_mask: bool, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "row-without-image")
    oracle, model = make_pair(case, tmp_path)
    inputs = oracle_inputs(case)
    mask = inputs.pop("pixel_attention_mask")
    assert not inputs["pixel_values"][1].any()
    if with_mask:
        inputs["pixel_attention_mask"] = torch.ones_like(mask)
    with torch.no_grad():
        ours, theirs = forward_padded(model, **inputs), oracle(**inputs)
    kept = inputs["attention_mask"].bool()
    assert relative_error(ours.logits[kept], theirs.logits[kept]) < RELATIVE
    inputs["pixel_values"].zero_()
    with pytest.raises(ValueError, match="whole patch of some image"):
        forward_padded(model, **inputs)


def test_inputs_that_do_not_fit_the_model_are_refused(
    mixed: tuple[TinyCase, Any, Idefics2],
) -> None:
    case, _, model = mixed
    batch, features = TextBatch.from_ids(case.token_ids()), torch.zeros(4, 5, 64)
    assert model(batch, features).isfinite().all()
    for rows in (features[:3], torch.zeros(5, 5, 64)):
        wanted = f"image tokens must be as many as rows of image_features {len(rows) * 5}, got 20"
        with pytest.raises(ValueError, match=wanted):
            model(batch, rows)
    # The embedding has 128 rows
    for id in (99, 127, 128, -1):
        with pytest.raises(IndexError):
            model(TextBatch.from_ids([[3, id]]))
        with pytest.raises(IndexError):
            model.loss(TextBatch.from_ids([[3, 4]]), torch.tensor([3, id]))
    with pytest.raises(ValueError, match=r"labels must be \(2,\), one a token, got \(3,\)"):
        model.loss(TextBatch.from_ids([[3, 4]]), torch.tensor([3, 4, 5]))
    assert model(TextBatch.from_ids([[3] * 256])).isfinite().all()
    with pytest.raises(ValueError, match="at most 256 tokens, got one of 257"):
        model(TextBatch.from_ids([[3, 4], [3] * 257]))


def test_tokenizer_with_an_id_beyond_the_models_is_refused(tmp_path: Path) -> None:
    """The number of tokens is unchanged, but one id is in the padding of the embedding."""
    write_checkpoint(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["▁Device"] = 32010
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="must have at most the model's 32003 tokens, got 32011"):
        Processor.load(tmp_path, ModelConfig.load(tmp_path))


def test_cache_without_a_paged_view_is_refused(tmp_path: Path) -> None:
    _, model = make_pair(CASES[0], tmp_path)
    batch = TextBatch.from_ids([[3, 4]])
    with pytest.raises(ValueError, match="must have none"):
        model(batch, None, [])
