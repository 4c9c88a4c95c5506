"""After the warm-up, no request compiles a kernel, whatever its sizes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton

from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_engine.runtime.warm_up import warm_up_model, warm_up_sampling
from idefics2_kernels import TRITON
from paths import DEMO, TESTS
from request_sizes import PAGE_SIZE, ROWS, draw, image_batches, text_batches

# The smallest size at which ``rotary`` no longer prefetches
_NO_PREFETCH = 133


CASES = ["90,8b,bf16", "90,8b,nf4", "90,8b,nf4-lora", "90,demo,fp32", "80,demo,nf4-lora"]


def compilations(*cases: str) -> list[dict[str, Any]]:
    """Run ``tools/compilations.py`` and return the compilations after the warm-up, and totals.

    A separate process is needed, because the import of a kernel decides whether Triton interprets.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = environment["PYTHONPATH"], str(TESTS / "helpers")
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, str(TESTS / "tools" / "compilations.py"), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_only_a_size_without_a_warm_up_has_a_variant_of_its_own() -> None:
    # The last case shows that a missing size is noticed
    *totals, late, with_late = compilations(*CASES, f"90,8b,bf16,{_NO_PREFETCH}")
    assert len(totals) == len(CASES), totals
    for total in (*totals, with_late):
        assert total["launches"] > 5_000
        assert total["variants"] > 20
    assert late["kernel"] == "idefics2_kernels.rotary._rotary_kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_nothing_compiles_after_the_warm_up(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    model = Idefics2(ModelConfig.load(DEMO), TRITON, device, dtype)
    model.init_weights()
    kv_cache = KVCache(model.config.text, 4, PAGE_SIZE, device, dtype)
    for kernel in _kernels():
        kernel.device_caches.clear()
    warm_up_model(model, kv_cache)
    warm_up_sampling(model)
    warm = _num_compiled()
    assert warm > 20
    for name, images in image_batches(model):
        model.image_features(images)
        assert _num_compiled() == warm, name
    for name, step in text_batches(device):
        model(step, None, kv_cache.layers)
        assert _num_compiled() == warm, name
    for count in ROWS:
        for logits in (dtype, torch.float32):
            for padded in (True, False):
                draw(model, count, logits, padded=padded)
        assert _num_compiled() == warm, count
    torch.cuda.synchronize()


def _kernels() -> list[Any]:
    """Return all jitted functions of the kernels' package."""
    return [
        value
        for name, module in list(sys.modules.items())
        if name.startswith("idefics2_kernels.")
        for value in vars(module).values()
        if isinstance(value, triton.runtime.jit.JITFunction)
    ]


def _num_compiled() -> int:
    """Return the number of compiled kernels that the process has loaded."""
    functions = {id(kernel): kernel for kernel in _kernels()}
    caches = [cache for one in functions.values() for cache in one.device_caches.values()]
    return sum(len(cache[0]) for cache in caches)
