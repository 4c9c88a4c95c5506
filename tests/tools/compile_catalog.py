"""Compile every kernel of the catalog for a GPU that this machine need not have.

    PYTHONPATH=kernels python tests/tools/compile_catalog.py 90

The host wrappers run unchanged at the model's shapes, on meta tensors, which have no memory. Only
the launch is left out. The program prints a line of JSON for each compiled kernel. test_compile
runs it.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.disasm import path_to_cuobjdump

from absent_gpu import AbsentGPU
from idefics2_kernels.catalog import rows
from idefics2_kernels.gpu import checks


def _sass(cubin: bytes) -> str:
    """Disassemble a kernel.

    ``triton.tools.disasm.get_sass`` omits everything after the first 64 KiB.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([path_to_cuobjdump(), "-sass", file.name], text=True)


def _digest(sass: str) -> str:
    """Return the SHA-256 of the instructions without names of symbols.

    Names of symbols may change, machine code may not.
    """
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\*", sass)
    return hashlib.sha256(re.sub(r"\(\S*@\S*\)", "()", "\n".join(lines)).encode()).hexdigest()


# Patterns of the loads that must follow the wait, for kernels that also load before it. NF4's
# kernels load the weight before it, with ordinary loads. They load x with copies to shared memory
# (LDGSTS) or with a hint to keep it in the L1 cache (EL). The other kernels load the values that
# decide what to prefetch before it. Those loads bypass the L1 cache (STRONG).
_NOT_A_LOOK = r"LDG(?!\S*\.STRONG)|LDGSTS"
_LOADS = {
    "_few_rows_hopper_kernel": "LDGSTS",
    "_gemv_kernel": r"LDG\S*\.EL\S*",
    "_decode_attention_kernel": _NOT_A_LOOK,
    "_perceiver_attention_kernel": _NOT_A_LOOK,
    "_rotary_kernel": _NOT_A_LOOK,
}


def _waits_first(kernel: str, sass: str) -> bool:
    """Return whether the wait for the previous kernel (ACQBULK) comes first in the machine code.

    It must precede the loads of ``_LOADS``, or all loads of other kernels, and all writes.
    """
    loads = _LOADS.get(kernel, "LDG|LDGSTS")
    found = re.search(rf"\b(?:ACQBULK|{loads}|UTMALDG|STG|ATOMG|REDG?)\b", sass)
    return found is not None and found[0] == "ACQBULK"


def main(arch: int) -> None:
    """Compile for ``sm_<arch>``."""
    driver.set_active(AbsentGPU(arch))
    # With this setting the wrappers accept tensors that are not on a CUDA device
    checks.INTERPRETED = True
    launch = JITFunction.run
    seen: set[str] = set()
    case_name = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            sass = _sass(compiled.asm["cubin"])
            report = {
                "kernel": self.__name__,
                "case": case_name,
                "arch": arch,
                "digest": _digest(sass),
                "triton": triton.__version__,
                "shared": compiled.metadata.shared,
                "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                "is_dependent": bool(compiled.metadata.launch_pdl),
                "waits_first": _waits_first(self.__name__, sass),
                "waits": sass.count("WARPGROUP.DEPBAR"),
                "wgmma": sorted(set(re.findall(r"HGMMA\.(\d+x\d+x\d+)", sass))),
            }
            # The kernel addresses the start of shared memory in assembly, where NF4's table may be.
            # The first access at a constant offset after the start is reported.
            if "mov.u32 $0, global_smem" in compiled.asm["llir"]:
                offsets = re.findall(r"@global_smem, i32 (\d+)", compiled.asm["llir"])
                report["behind_table"] = min(map(int, offsets), default=compiled.metadata.shared)
            print(json.dumps(report), flush=True)
        return compiled

    JITFunction.run = compile_only
    for spec, implementation, case in rows("model"):
        case_name = f"{spec.name}-{implementation}-{case.name}"
        inputs = spec.make_inputs(case, torch.device("meta"))
        spec.implementations[implementation](**inputs)


if __name__ == "__main__":
    main(int(sys.argv[1]))
