"""Run one small case of every kernel under compute-sanitizer: no access out of bounds, no race in shared memory.

make sanitize                       # needs a CUDA device, and compute-sanitizer on the path
python tests/sanitize.py rms_norm   # one kernel
"""

import os
import subprocess
import sys
from pathlib import Path

_TOOLS = ("memcheck", "racecheck")


def run_cases(names: list[str]) -> None:
    """Call the kernels on the device, each on its first case in 16 bit that is not empty."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    from idefics2_kernels.catalog import rows

    done = set()
    for spec, implementation, case in rows("any"):
        if (names and spec.name not in names) or (spec.name, implementation) in done:
            continue
        torch.manual_seed(0)
        inputs = spec.make_inputs(case, torch.device("cuda"))
        outputs = spec.run(spec.implementations[implementation], inputs)
        if case.dtype is not torch.float32 and all(output.numel() for output in outputs):
            done.add((spec.name, implementation))
            print(f"{spec.name} {implementation} {case.name}", flush=True)
    torch.cuda.synchronize()


def main() -> int:
    """Run the kernels named on the command line, or all, under each tool."""
    if sys.argv[1:2] == ["--run"]:
        run_cases(sys.argv[2:])
        return 0
    # without caching, an access past a tensor is an access past an allocation
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in _TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable]
        done = subprocess.run([*command, __file__, "--run", *sys.argv[1:]], env=environment)
        if done.returncode:
            print(f"{tool}: not clean")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
