"""The workloads of the whole model: equal in every run, and distributed as documented."""

import io
from collections import Counter
from dataclasses import asdict

import pytest
from PIL import Image

from idefics2_bench.workloads import (
    LATENCY_CASES,
    NEW_TOKENS,
    SIZES,
    OfflineRequest,
    latency_case,
    offline_counts,
    offline_requests,
    tiles,
)
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from paths import EIGHT_B


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split=False)


@pytest.fixture(scope="module")
def requests(processor: Processor) -> list[OfflineRequest]:
    return offline_requests(processor)


def test_requests_are_drawn_as_documented(
    processor: Processor, requests: list[OfflineRequest]
) -> None:
    assert len(requests) == 256
    assert Counter(len(request.images) for request in requests) == {1: 7 * 32, 2: 32}
    control = processor.tokenizer.control_ids
    lengths = [sum(id not in control for id in r.prompt_token_ids) for r in requests]
    assert min(lengths) in range(16, 24)
    assert max(lengths) in range(248, 257)
    # The mean of 16 to 256 is 136
    assert 126 < sum(lengths) / 256 < 146
    new = Counter(request.max_tokens for request in requests)
    assert sorted(new) == list(NEW_TOKENS)
    # The expected number is 51 each
    assert min(new.values()) > 30
    sizes = Counter(size for request in requests for size in request.sizes)
    assert sorted(sizes) == sorted(SIZES)
    # The expected number is 36 each
    assert min(sizes.values()) > 20


def test_prompts_and_image_files_match_their_request(
    processor: Processor, requests: list[OfflineRequest]
) -> None:
    for request in requests[:16]:
        draft = processor.draft_token_prompt(request.prompt_token_ids, request.images)
        assert draft.prompt.count("<image>") == len(request.images)
        text = draft.prompt.partition("<image>" * len(request.images))[2]
        assert "<image>" not in text
        for size, file in zip(request.sizes, request.images, strict=True):
            with Image.open(io.BytesIO(file)) as image:
                assert (image.format, image.height, image.width) == ("JPEG", *size)
    files = [file for request in requests for file in request.images]
    assert len(set(files)) == len(files) == 288


def test_counts_equal_the_processors_output(
    processor: Processor, requests: list[OfflineRequest]
) -> None:
    some = requests[:16]
    drafts = [processor.draft_token_prompt(r.prompt_token_ids, r.images) for r in some]
    prompts = processor.finish(drafts)
    all_tiles = [tile for prompt in prompts for tile in prompt.tiles]
    ids = [id for prompt in prompts for id in prompt.token_ids]
    assert asdict(offline_counts(some, processor)) == {
        "images": len(all_tiles),
        "patches": sum(len(tile.position_ids()) for tile in all_tiles),
        "image_tokens": 64 * len(all_tiles),
        "text_tokens": len(ids) - 64 * len(all_tiles),
        "new_tokens": sum(r.max_tokens for r in some),
    }


def test_seed_determines_requests(processor: Processor, requests: list[OfflineRequest]) -> None:
    assert offline_requests(processor, 10) == requests[:10]
    assert offline_requests(processor, 10, seed=1) != requests[:10]


def test_shrinking_divides_the_tokens(processor: Processor, requests: list[OfflineRequest]) -> None:
    small = offline_requests(processor, 10, shrink=16)
    assert [request.max_tokens for request in small] == [r.max_tokens // 16 for r in requests[:10]]
    control = processor.tokenizer.control_ids
    assert {sum(id not in control for id in r.prompt_token_ids) for r in small} <= set(range(1, 17))


def test_latency_cases_are_parsed_from_names() -> None:
    cases = [latency_case(name) for name in LATENCY_CASES]
    assert [(case.kernel, case.batch, case.length) for case in cases] == [
        ("step", 1, 200),
        ("step", 32, 200),
        ("step", 128, 200),
        ("image", 8, 0),
        ("image", 16, 0),
        ("image", 16, 0),
        ("prefill", 1, 4096),
        ("prefill", 1, 16384),
    ]
    whole, small, mixed = (case.sizes for case in cases if case.kernel == "image")
    assert (whole, small) == (((980, 980),) * 8, ((378, 504),) * 16)
    assert len(mixed) == 16
    assert len(set(mixed)) > 3
    assert set(mixed) <= set(SIZES)
    assert latency_case("image-mixed-b16").sizes == mixed
    assert latency_case("decode-b2-s64").length == 64
    assert sum(tile.num_patches for tile in tiles(cases[3], 14, 70)) == 8 * 4900
    for name in ("decode", "decode-b0", "image-980", "prefill-x", "image-mixed-b16-s2"):
        with pytest.raises(ValueError, match="case must be one like"):
            latency_case(name)
