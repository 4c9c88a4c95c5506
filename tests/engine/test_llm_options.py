"""Arguments of ``LLM``: wrong types and values out of range are refused before a file is read."""

import inspect
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idefics2_engine import LLM
from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.llm_options import LLMOptions, at_least_one
from idefics2_kernels import REFERENCE

DEFAULTS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(LLM).parameters.items()
}
# Python refuses to print a number of so many digits
HUGE = 10**5000
FLAG = [1, 0, "yes", np.bool_(True), 1.0]
NO_TEXT = [1, b"x", ["x"], True, math.nan]
COUNT = [0, -1, 2.5, 2.0, True, "8", math.nan, 10**12, HUGE, [8]]
BAD: dict[str, list[Any]] = {
    "model": [7, b"x", ["x"], True],
    "revision": NO_TEXT,
    "adapter": [7, b"x", ["x"], False],
    "merge_adapter": FLAG,
    "verify": [*FLAG, None],
    "check_finite": [*FLAG, None],
    "load_format": ["pickle", "", None, *NO_TEXT],
    "device": [None, 0, b"cpu", ["cpu"]],
    "dtype": [None, 32, torch.int8, float, ["float32"]],
    "quantization": ["int8", "", *NO_TEXT],
    "quantized_parts": ["text", [], ["head"], [1], {"text"}, 7],
    "double_quant": [*FLAG, None],
    "split_images": FLAG,
    "max_model_len": [1, *COUNT],
    "max_num_seqs": COUNT,
    "max_num_batched_tokens": [None, *COUNT],
    "enable_prefix_caching": [*FLAG, None],
    "kv_cache_tokens": COUNT,
    "gpu_memory_utilization": [0, 1.5, -0.5, math.nan, math.inf, "0.9", None, True, HUGE],
    "enforce_eager": [*FLAG, None],
    "share_prefix_reads": [*FLAG, None],
    "seed": ["x", None, 1.0, True, math.nan, 2**63, HUGE, [1]],
    "sampling_order": ["VLLM", None, *NO_TEXT],
    "image_policy": ["other", None, *NO_TEXT],
    "max_image_pixels": [None, *COUNT],
    "max_media_bytes": [None, *COUNT],
    "allowed_media_root": [7, b"x", ["x"], True],
    "allowed_media_hosts": ["a.example", None, 7, [7], {"a.example"}],
    "media_timeout": [0, -1, math.nan, math.inf, "20", None, True, 10**12, HUGE],
    "image_threads": COUNT,
    "image_workers": [n for n in COUNT if n != 0],
    "ops": [7, "triton", {}, type(REFERENCE)],
}
# Values given and values kept
GOOD: dict[str, list[tuple[Any, Any]]] = {
    "model": [("org/name", "org/name"), (Path("a"), Path("a")), (None, None)],
    "quantized_parts": [(["text"], ("text",)), (None, None)],
    "device": [(torch.device("cuda", 1), "cuda:1")],
    "dtype": [(torch.float64, torch.float64), ("bfloat16", "bfloat16")],
    "max_num_seqs": [(np.int64(8), 8), (10**6, 10**6)],
    "kv_cache_tokens": [(np.int32(640), 640)],
    "gpu_memory_utilization": [(1, 1.0), (np.float32(0.5), 0.5)],
    "seed": [(-5, -5), (10**12, 10**12), (np.uint8(3), 3)],
    "allowed_media_hosts": [(["a.example"], ("a.example",))],
    "media_timeout": [(3, 3.0)],
}


def test_tables_cover_every_argument() -> None:
    assert [field.name for field in fields(LLMOptions)] == list(DEFAULTS)
    assert BAD.keys() == DEFAULTS.keys()


def test_options_have_the_defaults_of_llm() -> None:
    assert {field.name: field.default for field in fields(LLMOptions)} == DEFAULTS


def test_defaults_are_valid_and_unchanged() -> None:
    options = LLMOptions(**DEFAULTS)
    for name, value in DEFAULTS.items():
        assert getattr(options, name) == value
        assert type(getattr(options, name)) is type(value), name


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs], ids=short_repr
)
def test_wrong_type_or_range_is_a_config_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be .*, got ") as caught:
        LLM(**{"model": "no/such/folder", name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [(name, *pair) for name, pairs in GOOD.items() for pair in pairs],
)
def test_values_become_python_types(name: str, given: Any, kept: Any) -> None:
    value = getattr(replace(LLMOptions(**DEFAULTS), **{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


def test_path_may_be_any_path_like() -> None:
    class Named:
        def __fspath__(self) -> str:
            return "no/such/folder"

    with pytest.raises(ConfigError, match=r"model must be a folder .*, got 'no/such/folder'"):
        LLM(Named())  # type: ignore[arg-type]


def test_numpy_numbers_are_accepted() -> None:
    llm = LLM(
        device="cpu",
        max_num_seqs=np.int64(2),  # type: ignore[arg-type]
        max_image_pixels=np.int64(10**6),  # type: ignore[arg-type]
        seed=np.int64(3),  # type: ignore[arg-type]
    )
    assert type(llm.engine_config.max_num_seqs) is int
    assert type(llm.processor.media.max_image_pixels) is int
    with pytest.raises(ConfigError, match=r"in_flight must be an integer of at least 1, got 1\.5"):
        next(llm.iterate([], in_flight=1.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.5, 0, -1, True, "8", math.nan, None, -HUGE], ids=short_repr)
def test_at_least_one_refuses_other_values(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^in_flight must be an integer of at least 1, got "):
        at_least_one("in_flight", value)


def test_at_least_one_accepts_numpy_integers() -> None:
    assert at_least_one("in_flight", np.int64(3)) == 3  # type: ignore[arg-type]
    assert at_least_one("in_flight", 10**12) == 10**12


@pytest.mark.parametrize("merge", [True, False])
def test_merge_adapter_must_come_with_an_adapter(merge: bool) -> None:
    with pytest.raises(ConfigError, match=f"merge_adapter must come with an adapter, got {merge}"):
        LLMOptions(merge_adapter=merge)
    assert LLMOptions(adapter="org/lora", merge_adapter=merge).merge_adapter is merge
