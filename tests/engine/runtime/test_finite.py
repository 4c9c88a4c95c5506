"""A request whose logits are not finite fails alone.

Its keys, values and image features are not reused by other requests.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import RequestFailedError
from idefics2_engine.images.tiling import Tile
from idefics2_engine.model.text import rotary_table
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.runtime.model_runner import Runner
from idefics2_engine.scheduling.encoder_cache import EncoderCache
from idefics2_engine.scheduling.page_allocator import PageAllocator
from oracle import random_image

# In some tests the embedding of this token is NaN
POISON = 4321
PICTURE, OTHER = random_image(90, 60, seed=1), random_image(60, 90, seed=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1)
# The poisoned token is never drawn, and no end token is drawn before the sixth token
DRAWN = SamplingParams(seed=5, max_tokens=6, min_tokens=6, logit_bias={POISON: -100.0})
# The words fill more than a page of 64 tokens
WORDS = [1, *range(500, 600)]


Make = Callable[..., LLM]


@pytest.fixture(
    params=[
        pytest.param(("cpu", False), id="cpu"),
        pytest.param(("cpu", True), id="ahead"),
        pytest.param(("cuda", True), id="kernels", marks=pytest.mark.gpu),
    ]
)
def make(checkpoint: Path, request: pytest.FixtureRequest) -> Make:
    """Return a function that loads the checkpoint, with or without run-ahead."""
    device, run_ahead = request.param

    def load(dtype: str = "float32") -> LLM:
        llm = LLM(checkpoint, device=device, dtype=dtype, max_model_len=200, max_num_seqs=8)
        llm.engine.config = replace(llm.engine.config, run_ahead=run_ahead)
        return llm

    return load


def prompt(*ids: int, picture: Any = None) -> dict[str, Any]:
    """Build a prompt of token ids that ends with the slots of ``picture``, if given."""
    if picture is None:
        return {"prompt_token_ids": [*ids]}
    slots = [32000, *[32001] * 4, 32000]
    return {"prompt_token_ids": [*ids, *slots], "multi_modal_data": {"image": [picture]}}


def assert_failed(output: RequestOutput, got: str = "nan") -> None:
    assert isinstance(output.error, RequestFailedError)
    wanted = f"request {output.request_id}: logits must be finite, got {got} for the largest"
    assert str(output.error) == wanted
    assert output.finished


def assert_equal(got: RequestOutput, wanted: RequestOutput) -> None:
    """Compare tokens exactly and log probabilities up to the rounding of different batches."""
    assert got.error is None
    for mine, theirs in zip(got.outputs, wanted.outputs, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
    assert scores(got) == pytest.approx(scores(wanted), abs=1e-3)


def scores(output: RequestOutput) -> list[float]:
    """Return the log probabilities of the prompt's tokens, if they were requested."""
    places = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    return [place[token].logprob for token, place in places if place]


@pytest.fixture
def mixed() -> tuple[list[Any], list[SamplingParams], list[bool]]:
    """Return prompts, parameters, and whether each prompt has the poisoned token."""
    prompts = [
        prompt(*WORDS),
        prompt(*WORDS, POISON, 700, 701),
        prompt(*WORDS, 700, 701),
        prompt(1, 700, picture=PICTURE),
        prompt(1, POISON, picture=PICTURE),
        prompt(1, 800),
        prompt(POISON),
        prompt(*WORDS, POISON, 700, 701),
    ]
    params = [[GREEDY, DRAWN][i % 2] for i in range(len(prompts))]
    params[2], params[4] = replace(DRAWN, n=3), replace(DRAWN, n=3)
    return prompts, params, [i in (1, 4, 6, 7) for i in range(len(prompts))]


def test_request_with_nan_fails_alone(make: Make, mixed: Any) -> None:
    llm = make()
    prompts, params, poisoned = mixed
    clean = llm.generate(prompts, params)
    llm = make()
    with torch.no_grad():
        llm.model.text.embedding[POISON, 3] = math.nan
    # The second run uses the caches of the first
    for _ in range(2):
        for got, wanted, is_poisoned in zip(
            llm.generate(prompts, params), clean, poisoned, strict=True
        ):
            if is_poisoned:
                assert_failed(got)
                assert not any(answer.token_ids for answer in got.outputs)
            else:
                assert_equal(got, wanted)
        llm.engine.scheduler.check_integrity()
        assert not llm.engine.has_work


def test_request_may_fail_after_some_tokens(make: Make) -> None:
    """The first token of the answer is the poisoned one, so no second token can be drawn."""
    llm = make()
    with torch.no_grad():
        llm.model.text.embedding[POISON] = math.nan
    forced = replace(GREEDY, logit_bias={POISON: 100.0}, logprobs=None)
    other, failed, several = llm.generate(
        [prompt(1, 800)] * 3, [GREEDY, forced, replace(DRAWN, n=2, logit_bias={POISON: 100.0})]
    )
    assert_equal(other, make().generate([prompt(1, 800)], GREEDY)[0])
    assert_failed(failed)
    assert failed.outputs[0].token_ids == [POISON]
    assert_failed(several)


@pytest.mark.parametrize("weight", ["head", "text", "vision"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_nan_in_one_weight_fails_the_requests_that_use_it(
    make: Make, params: SamplingParams, weight: str
) -> None:
    llm = make()
    words = llm.generate([prompt(1, 800)], params)[0]
    name = {
        "head": "lm_head",
        "text": "text.layers.0.mlp.down_proj.weight",
        "vision": "vision.layers.0.mlp.fc1.weight",
    }[weight]
    with torch.no_grad():
        llm.model.get_parameter(name)[7, 3] = math.nan
    got = llm.generate([prompt(1, 800), prompt(1, 900, picture=PICTURE)], params)
    assert_failed(got[1])
    if weight == "vision":
        assert_equal(got[0], words)
    else:
        assert_failed(got[0])


@pytest.mark.parametrize("part", ["text", "vision"])
def test_float16_overflow_fails_requests(make: Make, part: str) -> None:
    llm = make(dtype="float16")
    with torch.no_grad():
        llm.model.get_parameter(f"{part}.layers.0.mlp_norm.weight").mul_(6e4)
    with_picture, words = llm.generate([prompt(1, 900, picture=PICTURE), prompt(1, 900)], GREEDY)
    assert_failed(with_picture)
    assert (words.error is None) == (part == "vision")


def test_infinite_pixels_fail_their_request_alone(make: Make) -> None:
    llm = make()
    runner = llm.engine.runner
    image_config = replace(runner.image_config, std=(1e-46,) * 3)
    llm.engine.runner = Runner(
        llm.model, runner.kv_cache, image_config, llm.engine.config, llm.engine.gate
    )
    with_picture, words = llm.generate([prompt(1, 900, picture=PICTURE), prompt(1, 900)], GREEDY)
    assert_failed(with_picture)
    assert_equal(words, make().generate([prompt(1, 900)], GREEDY)[0])


def test_nan_angles_fail_every_request(make: Make) -> None:
    llm = make()
    text = llm.model.text
    with torch.inference_mode():
        text.cos_sin(llm.model.device).copy_(rotary_table(replace(text.config, rope_theta=1e-300)))
    for output in llm.generate([prompt(1, 900)] * 2, [GREEDY, DRAWN]):
        assert_failed(output)


@pytest.mark.parametrize("first", [GREEDY, replace(DRAWN, n=3)], ids=["greedy", "drawn"])
def test_failed_request_leaves_nothing_in_the_caches(
    make: Make, first: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder returns NaN once. Later answers must use neither its features nor their keys."""
    asked = [prompt(*WORDS, picture=PICTURE), prompt(1, picture=OTHER)]
    # These tokens fill whole pages after the image
    asked[0]["prompt_token_ids"] += range(600, 686)
    clean = make().generate(asked, GREEDY)
    llm = make()
    runner = llm.engine.runner
    encode = runner.encode

    def encode_nan(encodes: list[tuple[Tile, int]]) -> None:
        encode(encodes)
        runner.image_features[[entry for _, entry in encodes]] = math.nan

    monkeypatch.setattr(runner, "encode", encode_nan)
    for output in llm.generate(asked, first):
        assert_failed(output)
    monkeypatch.setattr(runner, "encode", encode)
    for cached in (0, 192):
        outputs = llm.generate(asked, GREEDY)
        assert outputs[0].num_cached_tokens == cached
        for got, wanted in zip(outputs, clean, strict=True):
            assert_equal(got, wanted)
    llm.engine.scheduler.check_integrity()


def test_nan_logits_fail_prompt_scoring(make: Make) -> None:
    llm = make()
    asked = [prompt(1, 800, 801), prompt(1, POISON, 801), prompt(*WORDS, 5)]
    params = replace(GREEDY, prompt_logprobs=2)
    clean = llm.generate(asked, params)
    with torch.no_grad():
        llm.model.text.embedding[POISON] = math.nan
    scored, failed, long = llm.generate(asked, params)
    assert isinstance(failed.error, RequestFailedError)
    assert "logits must be finite, got log probabilities that are NaN" in str(failed.error)
    assert_equal(scored, clean[0])
    assert_equal(long, clean[2])
    llm.engine.scheduler.check_integrity()


def test_infinite_logit_fails_its_request(make: Make) -> None:
    llm = make()
    with torch.no_grad():
        # Logits are then infinity or minus infinity
        llm.model.lm_head[700] = math.inf
    (got,) = llm.generate([prompt(1, 900)], GREEDY)
    assert isinstance(got.error, RequestFailedError)


def test_forgetting_page_names_keeps_the_pages() -> None:
    pages = PageAllocator(4, 16)
    held, idle = pages.allocate(2), pages.allocate(1)
    for page, name in zip([*held, *idle], (b"a", b"b", b"c"), strict=True):
        pages.remember(page, name)
    pages.release(idle)
    pages.forget([b"b", b"c", b"unknown"])
    pages.check_integrity([held])
    assert pages.find([b"a", b"b"]) == held[:1]
    assert pages.find([b"c"]) == []
    assert pages.allocate(1) == idle, "nameless pages are taken first"


def test_held_images_are_not_forgotten() -> None:
    cache = EncoderCache(3)
    for content in (b"held", b"idle", b"other"):
        cache.hold(content)
    cache.release(b"idle")
    cache.release(b"other")
    cache.forget([b"held", b"idle", b"unknown"])
    cache.check_integrity([b"held"])
    assert b"held" in cache
    assert b"idle" not in cache
    assert b"other" in cache
