"""List what Triton would compile for requests of many sizes after the engine's warm-up.

    PYTHONPATH=engine:kernels:tests/helpers python tests/tools/compilations.py 90,8b,nf4 80,demo,nf4

An argument is an architecture, a model and its weights, and perhaps a number of rows that the
warm-up leaves out. The weights ``nf4-lora`` are those of ``nf4`` with an adapter beside them. Each argument has a process of its own, forked after the imports.

No GPU is needed. The model runs on meta tensors, which have no memory. Compilations and launches
are left out; only the keys are computed under which Triton looks for compiled kernels. The program
prints a line of JSON for each compilation after the warm-up, and then one with totals for each
argument. test_compilations runs it.
"""

import json
import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from absent_gpu import AbsentGPU
from idefics2_engine.checkpoint.loader import build_model
from idefics2_engine.checkpoint.tensor_mapping import tensor_places
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import NF4Linear, SideBySide
from idefics2_engine.model.low_rank import LowRank
from idefics2_engine.model.quantization import Quantization
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_engine.runtime.warm_up import warm_up_model, warm_up_sampling
from idefics2_kernels import TRITON, variants
from idefics2_kernels.gpu import checks
from paths import DEMO, EIGHT_B
from request_sizes import PAGE_SIZE, ROWS, draw, image_batches, text_batches

META = torch.device("meta")
FOLDERS = {"8b": EIGHT_B, "demo": DEMO}


class _NotCompiled:
    """Stands for a compiled kernel. Launching it only counts the launch."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.launches = 0

    def launch_metadata(self, *_args: Any) -> None:
        """Return nothing, as there is no profiler."""

    def run(self, *_args: Any) -> None:
        self.launches += 1


@dataclass
class Compilations:
    """The compilations so far, by kernel and key."""

    kernels: dict[tuple[str, str], _NotCompiled] = field(default_factory=dict)
    # None during the warm-up
    request: str | None = None

    def compile(
        self, kernel: Any, key: str, _signature: object, device: int, *_args: Any
    ) -> _NotCompiled:
        """Stand in for ``JITFunction._do_compile``."""
        name = f"{kernel.__module__}.{kernel.__name__}"
        made = self.kernels[name, key] = kernel.device_caches[device][0][key] = _NotCompiled()
        if self.request is not None:
            print(json.dumps({"kernel": name, "request": self.request, "key": key}))
        return made


def make_model(name: str, dtype: torch.dtype, *, is_quantized: bool) -> Idefics2:
    """Build a model of one layer in each part, without memory."""
    config = ModelConfig.load(FOLDERS[name])
    config = replace(
        config,
        vision=replace(config.vision, num_layers=1),
        perceiver=replace(config.perceiver, num_layers=1),
        text=replace(config.text, num_layers=1),
    )
    model = build_model(config, TRITON, META, dtype, Quantization() if is_quantized else None)
    for place, module in model.named_modules():
        if isinstance(module, NF4Linear):
            weight = torch.empty(module.shape, dtype=dtype, device=META)
            model.set_nf4(place, TRITON.nf4_quantize(weight))
    return model


def add_adapter(model: Idefics2) -> None:
    """Keep a change of rank 8 beside every weight in NF4."""
    for place in tensor_places(model):
        layer = model.get_submodule(place.module.rpartition(".layers.")[0])
        if not isinstance(layer, SideBySide):
            layer = model.get_submodule(place.module)
        if isinstance(layer, NF4Linear | SideBySide):
            N, K = layer.shape
            a, b = (torch.empty(n, k, dtype=model.dtype, device=META) for n, k in ((8, K), (N, 8)))
            layer.low_rank = LowRank.combine((N, K), [(0, a, b)])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.inference_mode()
def main(arch: int, name: str, weights: str, left_out: int | None = None) -> None:
    """Print what is compiled after the warm-up for ``sm_<arch>``."""
    driver.set_active(AbsentGPU(arch))
    # Tensors may be on the meta device
    checks.INTERPRETED = True
    # Tensors without values cannot be compared. The tables of NF4 weights are the same
    torch.equal = lambda input, other: input.shape == other.shape
    # The meta implementation of PyTorch takes a millisecond
    torch.nn.functional.linear = _linear
    compilations = Compilations()
    JITFunction._do_compile = lambda kernel, *args: compilations.compile(kernel, *args)
    if left_out is not None:
        row_counts = variants.row_counts
        variants.row_counts = lambda *, is_quantized: tuple(
            count for count in row_counts(is_quantized=is_quantized) if count != left_out
        )
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = make_model(name, dtype, is_quantized=weights.startswith("nf4"))
    if weights == "nf4-lora":
        add_adapter(model)
    kv_cache = KVCache(model.config.text, 4, PAGE_SIZE, META, dtype)
    warm_up_model(model, kv_cache)
    warm_up_sampling(model)
    warm = len(compilations.kernels)
    for compilations.request, images in image_batches(model):
        model.image_features(images)
    for compilations.request, step in text_batches(META):
        model(step, None, kv_cache.layers)
    for count in ROWS:
        compilations.request = f"a draw of {count}"
        for logits in (dtype, torch.float32):
            for padded in (True, False):
                draw(model, count, logits, padded=padded)
    launches = sum(made.launches for made in compilations.kernels.values())
    print(json.dumps({"launches": launches, "variants": warm}))


if __name__ == "__main__":
    for case in sys.argv[1:]:
        child = os.fork()
        if not child:
            arch, model, weights, *left_out = case.split(",")
            main(int(arch), model, weights, *map(int, left_out))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{case}: status {status}")
