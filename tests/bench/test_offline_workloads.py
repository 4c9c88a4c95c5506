"""The workloads of ``bench offline``: equal in every run, and distributed as documented."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import pytest
from PIL import Image

from idefics2_bench.offline_workloads import (
    NEW_TOKENS,
    WORKLOADS,
    OfflineRequest,
    distinct_images,
    offline_counts,
    offline_name,
    offline_requests,
    tile_patches,
)
from idefics2_engine.jobs.plan.latency_case import SIZES
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor
from paths import EIGHT_B

Draw = Callable[..., list[OfflineRequest]]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split=False)


@pytest.fixture(scope="module")
def draw(processor: Processor) -> Draw:
    def drawn(name: str, count: int, **options: int) -> list[OfflineRequest]:
        return offline_requests(name, WORKLOADS[name].processor(processor), count, **options)

    return drawn


@pytest.fixture(scope="module")
def mixed(draw: Draw) -> list[OfflineRequest]:
    return draw("mixed", 256)


def num_text(request: OfflineRequest, processor: Processor) -> int:
    control = processor.tokenizer.control_ids
    return sum(id not in control for id in request.prompt_token_ids)


def finished(requests: list[OfflineRequest], processor: Processor) -> list[ProcessedPrompt]:
    return processor.finish(
        [processor.draft_token_prompt(r.prompt_token_ids, r.images) for r in requests]
    )


def test_mixed_requests_are_drawn_as_documented(
    processor: Processor, mixed: list[OfflineRequest]
) -> None:
    assert Counter(len(request.images) for request in mixed) == {1: 7 * 32, 2: 32}
    lengths = [num_text(request, processor) for request in mixed]
    assert min(lengths) in range(16, 24)
    assert max(lengths) in range(248, 257)
    # The mean of 16 to 256 is 136
    assert 126 < sum(lengths) / 256 < 146
    new = Counter(request.max_tokens for request in mixed)
    assert sorted(new) == list(NEW_TOKENS)
    # The expected number is 51 each
    assert min(new.values()) > 30
    sizes = Counter(size for request in mixed for size in request.sizes)
    assert sorted(sizes) == sorted(SIZES)
    # The expected number is 36 each
    assert min(sizes.values()) > 20


def test_mixed_requests_are_those_of_earlier_results(mixed: list[OfflineRequest]) -> None:
    # These counts are in bench/results/h100-offline.json, measured before the other workloads
    assert sum(request.max_tokens for request in mixed) == 23824
    assert sum(len(request.images) for request in mixed) == 288


def test_text_requests_are_the_mixed_ones_without_images(
    draw: Draw, processor: Processor, mixed: list[OfflineRequest]
) -> None:
    requests = draw("text", 256)
    control = processor.tokenizer.control_ids
    for request, other in zip(requests, mixed, strict=True):
        assert (request.images, request.sizes) == ((), ())
        assert request.max_tokens == other.max_tokens
        assert len(request.prompt_token_ids) == len(other.prompt_token_ids)
        begin = processor.tokenizer.bos_id
        assert [id for id in request.prompt_token_ids if id in control] == [begin]
    assert len({tuple(request.prompt_token_ids[:20]) for request in requests}) == 256


def test_vqa_requests_have_one_image_and_four_new_tokens(draw: Draw, processor: Processor) -> None:
    requests = draw("vqa", 20)
    for request in requests:
        assert request.sizes == ((480, 640),)
        assert request.max_tokens == 4
        assert num_text(request, processor) == 24
        assert request.prompt_token_ids.count(processor.tokenizer.image_id) == 64
    assert len(distinct_images(requests)) == 20


def test_shared_requests_begin_alike(draw: Draw, processor: Processor) -> None:
    requests = draw("shared", 20)
    first, *others = requests
    assert num_text(first, processor) == 1024
    for request in others:
        assert request.max_tokens == first.max_tokens == 32
        assert request.images == first.images
        # Another object with the same bytes, as in rows of a file
        assert request.images[0] is not first.images[0]
        assert request.prompt_token_ids[:-24] == first.prompt_token_ids[:-24]
    assert len({tuple(request.prompt_token_ids[-24:]) for request in requests}) == 20
    assert distinct_images(requests) == [first.sizes[0]]


def test_split_requests_have_five_tiles(draw: Draw, processor: Processor) -> None:
    requests = draw("split", 4)
    own = WORKLOADS["split"].processor(processor)
    assert not processor.image_config.split
    for request, prompt in zip(requests, finished(requests, own), strict=True):
        assert request.sizes == ((735, 980),)
        assert (request.max_tokens, num_text(request, processor)) == (64, 24)
        assert [tile.num_patches for tile in prompt.tiles] == tile_patches((735, 980), own)
        assert len(prompt.tiles) == 5
    assert len(distinct_images(requests)) == 4


def test_prompts_and_image_files_match_their_request(
    processor: Processor, mixed: list[OfflineRequest]
) -> None:
    for request in mixed[:16]:
        prompt = processor.token_prompt(request.prompt_token_ids, request.images).prompt
        assert prompt.count("<image>") == len(request.images)
        text = prompt.partition("<image>" * len(request.images))[2]
        assert "<image>" not in text
        for size, file in zip(request.sizes, request.images, strict=True):
            with Image.open(io.BytesIO(file)) as image:
                assert (image.format, image.height, image.width) == ("JPEG", *size)
    files = [file for request in mixed for file in request.images]
    assert len(set(files)) == len(files) == 288


@pytest.mark.parametrize("name", WORKLOADS)
def test_counts_equal_the_processors_output(name: str, processor: Processor, draw: Draw) -> None:
    some, own = draw(name, 9), WORKLOADS[name].processor(processor)
    prompts = finished(some, own)
    all_tiles = [tile for prompt in prompts for tile in prompt.tiles]
    ids = [id for prompt in prompts for id in prompt.token_ids]
    assert asdict(offline_counts(some, own)) == {
        "images": sum(len(request.images) for request in some),
        "patches": sum(len(tile.position_ids()) for tile in all_tiles),
        "image_tokens": 64 * len(all_tiles),
        "text_tokens": len(ids) - 64 * len(all_tiles),
        "new_tokens": sum(r.max_tokens for r in some),
    }


@pytest.mark.parametrize("name", WORKLOADS)
def test_seed_determines_requests(name: str, draw: Draw) -> None:
    requests = draw(name, 6)
    assert draw(name, 6) == requests
    for other in draw(name, 6, seed=1):
        assert not any(set(other.images) & set(request.images) for request in requests)
        assert all(other.prompt_token_ids != request.prompt_token_ids for request in requests)


def test_shrinking_divides_the_tokens(
    draw: Draw, processor: Processor, mixed: list[OfflineRequest]
) -> None:
    small = draw("mixed", 10, shrink=16)
    assert [request.max_tokens for request in small] == [r.max_tokens // 16 for r in mixed[:10]]
    assert {num_text(request, processor) for request in small} <= set(range(1, 17))
    (shared,) = draw("shared", 1, shrink=8)
    assert (num_text(shared, processor), shared.max_tokens) == (125 + 3, 4)
    (vqa,) = draw("vqa", 1, shrink=8)
    assert (num_text(vqa, processor), vqa.max_tokens) == (3, 1)


def test_cases_are_named_by_workload_and_count() -> None:
    assert [offline_name(name, 1024, 1) for name in WORKLOADS] == [
        "offline-1024",
        "text-1024",
        "vqa-1024",
        "shared-1024",
        "split-1024",
    ]
    assert offline_name("mixed", 4, 8) == "offline-4-shrink8"
    counts = {name: workload.count for name, workload in WORKLOADS.items()}
    assert counts == {"mixed": 256, "text": 1024, "vqa": 512, "shared": 512, "split": 64}
