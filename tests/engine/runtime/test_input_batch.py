"""Decode steps padded to the size of a graph, without a GPU. Padding is not read or written."""

from pathlib import Path

import numpy as np
import pytest
import torch

from guarded import guarded_allocations
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.device import to_device
from idefics2_engine.images.tiling import Tile
from idefics2_engine.runtime.image_graphs import batches, patch_sizes
from idefics2_engine.runtime.input_batch import (
    NOTHING,
    StepShape,
    pack,
    padded,
    resolve_pending_tokens,
    text_batch,
)
from idefics2_engine.runtime.text_graphs import MAX_SEQUENCES, MAX_TOKENS, decode_sizes, token_sizes
from idefics2_kernels import TRITON


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled: test_runtime runs graphs"
)
# NumPy warns about rows that are all NaN
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padding_changes_nothing(checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cpu", dtype="float32", max_model_len=200, kv_cache_tokens=512)
    # The kernels are interpreted, because the reference returns no rows for padding. They compute
    # the step without its logits, and the reference computes what comes before it.
    model = load_checkpoint(checkpoint, TRITON, dtype=torch.float32)
    engine, runner = llm.engine, llm.engine.runner
    layers = runner.kv_cache.layers
    for tensor in (tensor for layer in layers for tensor in layer):
        tensor.fill_(float("nan"))
    for ids in ([1, 5, 6, 7], [1, *range(20, 84)]):
        (prompt,) = llm.processor.finish(
            [llm.request_builder.read_prompt({"prompt_token_ids": ids})]
        )
        engine.add(llm.request_builder.build(prompt, SamplingParams(temperature=0.0, max_tokens=5)))
    engine.step()
    packed = pack(engine.scheduler.schedule(), runner.kv_cache.page_size, 1)
    assert packed.is_decode
    before = [[tensor.clone() for tensor in layer] for layer in layers]
    found = []
    for step in (packed, padded(packed, StepShape(5, 5, 4))):
        for layer, old in zip(layers, before, strict=True):
            for tensor, value in zip(layer, old, strict=True):
                tensor.copy_(value)
        copies = to_device(step.arrays(), torch.device("cpu"))
        # This fills rows of padding with NaN
        with torch.inference_mode(), guarded_allocations():
            hidden = model.hidden_states(text_batch(copies, copies[0], step), None, layers)[:2]
        found.append([hidden, *(tensor.clone() for layer in layers for tensor in layer)])
    for plain, wide in zip(*found, strict=True):
        torch.testing.assert_close(wide, plain, equal_nan=True)
    written = found[1][1].view(torch.int32) != before[0][0].view(torch.int32)
    assert written.flatten(2).any(-1).any(1).sum() == 2, "a slot in a page of each sequence"


def test_step_without_chunks_is_all_padding() -> None:
    step = padded(NOTHING, StepShape(3, 3, 2))
    assert step.slots.tolist() == [-1] * 3
    assert step.cu_seqlens.tolist() == [0] * 4
    assert step.block_table.shape == (3, 2)


def test_pending_tokens_are_read_from_the_last_step() -> None:
    last_tokens = torch.tensor([7, 8, 9], dtype=torch.int32)
    input_ids = torch.tensor([4, -1, -3, 0], dtype=torch.int32)
    assert resolve_pending_tokens(input_ids, last_tokens).tolist() == [4, 7, 9, 0]


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (17, [1, 2, 4, 8, 16, 24])],
)
def test_sizes_of_decode_graphs(most: int, sizes: list[int]) -> None:
    assert decode_sizes(most) == sizes


def test_decode_sizes_are_bounded() -> None:
    assert decode_sizes(10**6) == decode_sizes(MAX_SEQUENCES)
    assert decode_sizes(MAX_SEQUENCES)[-1] == MAX_SEQUENCES


@pytest.mark.parametrize("most", [1, 64, 65, 1024, 1025, 4096, 5000, 8192, 10**5])
def test_every_step_fits_a_graph(most: int) -> None:
    for sizes, needed in ((token_sizes(most), min(most, MAX_TOKENS)), (patch_sizes(most), most)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] >= needed
        assert len(sizes) < 2 or sizes[-2] < needed


def test_images_are_divided_into_batches_that_fit() -> None:
    tiles = [Tile(np.zeros((14 * side, 14, 3), np.uint8), 14, 70) for side in (3, 4, 5, 9, 1, 1, 1)]
    encodes = [(tile, entry) for entry, tile in enumerate(tiles)]
    parts = list(batches(encodes, 8, 2))
    assert [[entry for _, entry in part] for part in parts] == [[0, 1], [2], [3], [4, 5], [6]]
    assert list(batches([], 8, 2)) == []
