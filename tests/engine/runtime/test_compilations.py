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


def compilations(*arguments: object) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Run ``tools/compilations.py`` and return the compilations after the warm-up, and totals.

    A separate process is needed, because the import of a kernel decides whether Triton interprets.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = environment["PYTHONPATH"], str(TESTS / "helpers")
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    # The oldest supported version is in an environment of its own
    python = os.environ.get("COMPILE_PYTHON", sys.executable)
    command = [python, str(TESTS / "tools" / "compilations.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *late, totals = [json.loads(line) for line in done.stdout.splitlines()]
    return late, totals


@pytest.mark.parametrize(
    ("arch", "model", "weights"),
    [(90, "8b", "bf16"), (90, "8b", "nf4"), (90, "demo", "fp32"), (80, "demo", "nf4")],
)
def test_no_size_has_a_variant_of_its_own(arch: int, model: str, weights: str) -> None:
    late, totals = compilations(arch, model, weights)
    assert late == []
    assert totals["launches"] > 5_000
    assert totals["variants"] > 20


def test_a_missing_size_is_noticed() -> None:
    late, _ = compilations(90, "8b", "bf16", _NO_PREFETCH)
    assert [one["kernel"] for one in late] == ["idefics2_kernels.rotary._rotary_kernel"]


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
