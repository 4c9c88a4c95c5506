r"""Sweep one kernel's launch options and print the best.

    python bench/idefics2_bench/tune.py flash_attention text-causal-16k \
        BLOCK_M=64,128 BLOCK_N=64,128 num_warps=4,8 num_stages=2,3
    python bench/idefics2_bench/tune.py flash_attention vision-1225 BUFFERS=2,3 IN_TURN=0,1 \
        --module attention.flash_attention_hopper

Each combination replaces the same options in the result of the module's ``launch_config``.
Combinations that fail or give a wrong result are printed and not timed. A CUDA device is required.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch

from idefics2_bench.timing import measure, num_copies
from idefics2_kernels.catalog import Inputs, KernelSpec, rows
from idefics2_kernels.catalog.criterion import case_error


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep with the arguments ``argv``, or those of the command line.

    Returns:
        The exit code: 1 if no combination could be timed, else 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel")
    parser.add_argument("case")
    parser.add_argument("options", nargs="+", metavar="NAME=VALUE,VALUE")
    parser.add_argument("--impl", help="implementation; the first unless given")
    parser.add_argument("--module", help="where its launch options are; its own unless given")
    arguments = parser.parse_args(argv)
    named = [option.split("=") for option in arguments.options]
    choices = {name: [int(value) for value in values.split(",")] for name, values in named}
    for spec, implementation, case in rows("model"):
        if (spec.name, case.name) == (arguments.kernel, arguments.case) and arguments.impl in (
            None,
            implementation,
        ):
            break
    else:
        parser.error(f"no case {arguments.case!r} of {arguments.kernel!r}")
    torch.manual_seed(0)
    device = torch.device("cuda")
    sets = [spec.make_inputs(case, device) for _ in range(num_copies(spec.cost(case).bytes))]
    own = spec.implementations[implementation].__module__
    module = sys.modules[f"idefics2_kernels.{arguments.module}" if arguments.module else own]
    default = vars(module)["launch_config"]
    timed: list[tuple[float, str]] = []
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        vars(module)["launch_config"] = lambda *a, chosen=chosen, **k: replace(
            default(*a, **k), **chosen
        )
        text = ", ".join(f"{name}={value}" for name, value in chosen.items())
        try:
            wrong = case_error(spec, implementation, case, sets[0])
            if wrong > 1:
                print(f"{text}: wrong, {wrong:.2f} times the allowed error", flush=True)
                continue
            ms = measure({"": [_bound(spec, implementation, one) for one in sets]})[""].ms
        # A combination may need too many registers or too much shared memory, or fail to compile
        except Exception as problem:
            print(f"{text}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
            continue
        timed.append((ms, text))
        print(f"{text}: {ms * 1e3:.1f} us", flush=True)
    vars(module)["launch_config"] = default
    if not timed:
        return 1
    ms, text = min(timed)
    print(
        f"\n# {case.name} on {torch.cuda.get_device_name()}: {ms * 1e3:.1f} us\n"
        f"return LaunchConfig({text})"
    )
    return 0


def _bound(spec: KernelSpec, implementation: str, inputs: Inputs):  # type: ignore[no-untyped-def]
    return lambda: spec.implementations[implementation](**inputs)


if __name__ == "__main__":
    sys.exit(main())
