"""Facts that checks compare with: versions and GPUs that were tested, and their limits.

Tests compare what is also in ``pyproject.toml``, in ``LLM`` or in a kernel with its source.
"""

LEAST_PYTHON = (3, 11)
LEAST = {"torch": "2.11", "triton": "3.6", "numpy": "2.0"}
"""The oldest versions, as in ``pyproject.toml``."""

EXTRAS = {
    "hub": {"huggingface_hub": "1.0"},
    "parquet": {"pyarrow": "18.0", "zstandard": "0.23"},
    "remote": {"fsspec": "2024.10"},
    "datasets": {"datasets": "4.0"},
    "structured": {"llguidance": "1.9"},
    "ray": {"ray": "2.60"},
}
"""Optional packages by extra, with their oldest versions, as in ``pyproject.toml``."""

INTERPRETER_TRITON, INTERPRETER_NUMPY = "3.7", "2.4"
"""The interpreter of an older Triton fails under this numpy or a newer one."""

LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""The oldest Linux driver for a major version of CUDA (CUDA Toolkit Release Notes, table 2)."""

LEAST_CAPABILITY = 80
"""Ten times the compute capability from which the kernels compile: bf16 on tensor cores."""
GLUON_CAPABILITY = 90
"""The capability for which there are Gluon kernels, Hopper's."""
COMPILED_FOR = (80, 90)
"""Capabilities for which tests compile every kernel and check its shared memory."""
TUNED_ON = "H100"
MEASURED_ON = ("H100", "H200")
"""GPUs on which every kernel was checked and timed."""

MEMORY_UTILIZATION = 0.9
"""The share of a GPU's memory that ``LLM`` uses by default."""
GRAPH_PATCHES = 16384
"""Most patches of a step that is a CUDA graph (``runtime/image_graphs.py``)."""
NF4_BLOCK, NF4_NESTED_BLOCK, NF4_NESTED_CODE_BYTES = 64, 256, 1024
"""Sizes of the NF4 format (``idefics2_kernels.nf4.nf4_weight``)."""
PREPARED_BYTES = 2 << 30
"""Bytes of prepared images that a job keeps (``jobs/job_options.py``)."""

SLOW_LOOP_SECONDS = 1.2
"""A loop of 10 million turns on a host that limits an H200: see ``slow_host`` in docs/benchmarks.md."""
FEW_CORES = 4
"""Fewer cores decode images more slowly than a GPU encodes them."""
LEAST_OPEN_FILES = 1024
RAY_SHARED_MEMORY = 1 << 30
"""Ray's object store falls back to disk where ``/dev/shm`` is small; Docker's default is 64 MiB."""
TRITON_CACHE_BYTES = 1 << 30
"""Disk that the compiled kernels of a model and its variants may take."""
