"""Run one small case of every kernel under compute-sanitizer.

    make sanitize                            # needs a CUDA device, and compute-sanitizer
    python tests/tools/sanitize.py rms_norm  # one kernel

There must be no access out of bounds and no race in shared memory.

One kind of report is ignored. With ``warp_specialize``, Triton uses the last eight bytes of shared
memory to assign work to warps, one byte a warp. It writes the bytes, all warps meet at a named
barrier, and each warp reads its byte. Racecheck does not see that barrier and reports every such
read as a hazard.
"""

import os
import re
import subprocess
import sys

_TOOLS = {
    "memcheck": ("--error-exitcode", "1"),
    "racecheck": ("--racecheck-report", "hazard", "--print-limit", "1000000"),
}
# Bytes of shared memory that are reserved before a kernel's own, since Hopper
_RESERVED_BYTES = 1024
_HAZARD = re.compile(r"hazard detected at __shared__ (0x[0-9a-f]+)")
_KERNEL = re.compile(r"(?:Write|Read) Thread .* at (\w+)\+")
_HANDED_OUT = "handed out:"
_SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warn")


def run_cases(names: list[str]) -> None:
    """Call the kernels on the device, each on its first nonempty case in 16 bit."""
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
    for name, end in sorted(_ends_of_shared_memory()):
        print(f"{_HANDED_OUT} {name} {end - 8} {end}", flush=True)


def _ends_of_shared_memory() -> set[tuple[str, int]]:
    """Return each kernel with ``warp_specialize`` that ran, and the end of its shared memory.

    The end is the address that compute-sanitizer counts.
    """
    from triton.experimental.gluon._runtime import GluonJITFunction

    kernels = [
        kernel
        for name, module in list(sys.modules.items())
        if name.startswith("idefics2_kernels")
        for kernel in vars(module).values()
        if isinstance(kernel, GluonJITFunction)
    ]
    return {
        (compiled.metadata.name, _RESERVED_BYTES + compiled.metadata.shared)
        for kernel in kernels
        for cache in kernel.device_caches.values()
        for compiled in cache[0].values()
        if "warp_specialize" in compiled.asm["ttgir"]
    }


def hazards(lines: list[str]) -> list[str]:
    """Return the hazards in racecheck's report ``lines``, and faults of the report itself.

    Hazards of the bytes that assign work to warps are left out.
    """
    handed_out: dict[str, set[int]] = {}
    for line in lines:
        if line.startswith(_HANDED_OUT):
            name, begin, end = line.removeprefix(_HANDED_OUT).split()
            handed_out.setdefault(name, set()).update(range(int(begin), int(end)))
    found, seen = [], 0
    for i, line in enumerate(lines):
        if (hazard := _HAZARD.search(line)) is not None:
            seen += 1
            kernels = {match[1] for near in lines[i : i + 3] if (match := _KERNEL.search(near))}
            address = int(hazard[1], 16)
            if not kernels or any(address not in handed_out.get(name, ()) for name in kernels):
                found.append(" ".join(lines[i : i + 3]))
    summary = next((match for line in lines if (match := _SUMMARY.search(line))), None)
    if summary is None or int(summary[1]) != seen or int(summary[2]) + int(summary[3]) != seen:
        found.append(f"racecheck: its summary must count the {seen} hazards that it lists")
    return found


def main() -> int:
    """Run the kernels named on the command line, or all, under each tool."""
    if sys.argv[1:2] == ["--run"]:
        run_cases(sys.argv[2:])
        return 0
    # Without caching, an access past a tensor is an access past an allocation
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, options in _TOOLS.items():
        command = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "no", *options]
        done = subprocess.run(
            [*command, sys.executable, __file__, "--run", *sys.argv[1:]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = done.stdout.splitlines()
        found = hazards(lines) if tool == "racecheck" else []
        if done.returncode or found:
            print(*(found or lines), f"{tool}: not clean", sep="\n")
            return 1
        print(*(line for line in lines if not line.startswith("=")), f"{tool}: clean", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
