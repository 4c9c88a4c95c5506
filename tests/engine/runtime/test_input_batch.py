"""Decode steps padded to the size of a graph, without a GPU. Padding is not read or written."""

from pathlib import Path

import pytest
import torch

from guarded import guarded_allocations
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.device import to_device
from idefics2_engine.runtime.cuda_graphs import MAX_SIZE, graph_sizes
from idefics2_engine.runtime.input_batch import (
    NOTHING,
    pack,
    padded,
    resolve_pending_tokens,
    text_batch,
)
from idefics2_kernels import TRITON


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled: test_runtime runs graphs"
)
# NumPy warns about rows that are all NaN
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padding_changes_nothing(checkpoint: Path) -> None:
    llm = LLM(
        checkpoint,
        device="cpu",
        dtype="float32",
        max_model_len=200,
        kv_cache_tokens=512,
        # The kernels are interpreted, because the reference returns no rows for padding
        ops=TRITON,
    )
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
    packed = pack(engine.scheduler.schedule(), {}, runner.kv_cache.page_size, 1)
    assert packed.is_decode
    before = [[tensor.clone() for tensor in layer] for layer in layers]
    found = []
    for step in (packed, padded(packed, 5, 4)):
        for layer, old in zip(layers, before, strict=True):
            for tensor, value in zip(layer, old, strict=True):
                tensor.copy_(value)
        copies = to_device(step.arrays(), torch.device("cpu"))
        # This fills rows of padding with NaN
        with torch.inference_mode(), guarded_allocations():
            batch = text_batch(copies, copies[0], step, every_row=True)
            logits = llm.model(batch, None, layers)[:2]
        found.append([logits, *(tensor.clone() for layer in layers for tensor in layer)])
    for plain, wide in zip(*found, strict=True):
        torch.testing.assert_close(wide, plain, equal_nan=True)
    written = found[1][1].view(torch.int32) != before[0][0].view(torch.int32)
    assert written.flatten(2).any(-1).any(1).sum() == 2, "a slot in a page of each sequence"


def test_step_without_chunks_is_all_padding() -> None:
    step = padded(NOTHING, 3, 2)
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
def test_graph_sizes(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


def test_graph_sizes_are_bounded() -> None:
    assert graph_sizes(10**6) == graph_sizes(MAX_SIZE)
    assert graph_sizes(MAX_SIZE)[-1] == MAX_SIZE
