"""Tests that every kernel compiles for its GPUs and fits on them. No GPU is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from idefics2_kernels.nf4 import nf4_gemv_hopper
from paths import TESTS

# Bytes of shared memory that a thread block may use, by architecture
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# The shapes of the tensor core instructions that a case must use on Hopper. A head dim of 72 is
# computed as 64 + 16 columns, a head dim of 96 as 64 + 32.
WGMMA = {
    "flash_attention-plain-text-causal-16k": ["64x128x16"],
    "flash_attention-plain-vision-4900": ["64x16x16", "64x64x16"],
    "flash_attention-triton-text-causal-16k": ["64x128x16"],
    "flash_attention-triton-vision-4900": ["64x128x16", "64x16x16", "64x64x16"],
    "flash_attention_backward-triton-text-causal-16k": ["64x128x16", "64x64x16"],
    "flash_attention_backward-triton-vision-4900": ["64x16x16", "64x64x16"],
    "perceiver_attention-triton-perceiver-4964": ["64x32x16", "64x64x16"],
    "paged_attention-plain-chunk-512": ["64x128x16", "64x64x16"],
    "paged_attention-triton-chunk-512": ["64x128x16"],
    "paged_attention-triton-decode-shared-b64-s1088": ["64x128x16", "64x64x16"],
    "nf4_matmul-triton-28672x4096-m256": ["64x256x16"],
    "nf4_matmul-triton-6144x4096-m256": ["64x128x16"],
    "nf4_matmul-plain-28672x4096-m1": ["64x16x16"],
    "nf4_matmul-plain-28672x4096-m64": ["64x64x16"],
}
# These kernels may start before the previous kernel has ended
DEPENDENT = {
    "_add_low_rank_kernel",
    "_combine_kernel",
    "_decode_attention_kernel",
    "_few_rows_hopper_kernel",
    "_gemv_kernel",
    "_perceiver_attention_kernel",
    "_rms_norm_kernel",
    "_rotary_kernel",
    "_silu_mul_kernel",
    "_split_k_kernel",
}
# Bytes of shared memory on Hopper: 19 KB for each of two buffers (codes 8, x 8, nested absmax,
# offset and nested code 1 each), and 8 KB for x as the product's operand. A decoded tile of the
# weight would take another 32 KB.
NF4_SHARED_MEMORY = {"nf4_matmul-plain-28672x4096-m1": 47104}
# Bytes of NF4's table. It is at the start of shared memory in the kernels for few and many rows,
# whose first access at another constant offset must be at the table's end. The kernel for one row
# must have no such access before the end of its ``MEMORY``.
NF4_TABLE = 64 * 1024
# The number of instructions in the machine code that wait for Hopper's tensor cores. The kernel's
# loop has two steps with a wait each, and each of two warpgroups has its own copy of the loop. If
# ptxas runs short of registers, it adds waits between the products. Triton hides its warning.
NF4_WAITS = {"nf4_matmul-triton-28672x4096-m256": 4, "nf4_matmul-triton-6144x4096-m256": 4}


@pytest.mark.long
@pytest.mark.parametrize("arch", [80, 90])
def test_model_shapes_compile_and_fit(arch: int) -> None:
    # A separate process is needed, because the import of a kernel decides whether Triton interprets
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = TESTS / "tools" / "compile_catalog.py"
    done = subprocess.run(
        [sys.executable, str(script), str(arch)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports
    for report in reports:
        assert report["triton"] == version("triton")
        assert report["shared"] <= SHARED_MEMORY[arch], report
        assert report["spills"] == 0, report
        assert report["waits_first"] or not report["is_dependent"], report
    dependent = {report["kernel"] for report in reports if report["is_dependent"]}
    assert dependent == (DEPENDENT if arch >= 90 else set())
    if arch == 90:
        found = {report["case"]: report["wgmma"] for report in reports if report["wgmma"]}
        assert WGMMA.items() <= found.items()
        shared = {report["case"]: report["shared"] for report in reports if report["wgmma"]}
        assert NF4_SHARED_MEMORY.items() <= shared.items()
        behind = {report["case"]: report.get("behind_table") for report in reports}
        assert set(behind.values()) == {None, NF4_TABLE, nf4_gemv_hopper.MEMORY}
        assert behind["nf4_matmul-triton-28672x4096-m1"] == nf4_gemv_hopper.MEMORY
        assert behind["nf4_matmul-triton-28672x4096-m64"] == NF4_TABLE
        waits = {report["case"]: report["waits"] for report in reports if report["wgmma"]}
        assert NF4_WAITS.items() <= waits.items()
