"""The process that imports torch and Triton, and prints checks as lines of JSON.

It is the only module of this package that imports them, besides ``kernel_routes``. It may crash or
hang, which is why it is a process. Each check is printed as soon as it is made.
"""

import json
import os
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from idefics2_engine.doctor.check import Check, Status

# Of each of these operations one small case is compared: a norm, attention, a product with NF4
_RUN = ("rms_norm", "flash_attention", "nf4_matmul")


def main() -> None:
    """Print the checks."""
    # Libraries may print to standard output
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for check in child_checks():
        print(json.dumps(check.to_dict()), file=out, flush=True)


def child_checks() -> Iterator[Check]:
    """Yield the checks of ``deep.NAMES``."""
    begin = perf_counter()
    try:
        import torch
    except Exception as error:
        yield _failed("torch import", error, "pip install --force-reinstall torch")
        return
    seconds = perf_counter() - begin
    found = f"torch {torch.__version__} in {seconds:.1f} s"
    details: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    yield Check("torch import", Status.OK, found, details=details)
    cuda = _cuda_check()
    yield cuda
    if not cuda.details["devices"]:
        # Triton reads it when a kernel is defined
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield from _kernel_checks(cuda.details["devices"])
    except Exception as error:
        status = Status.PROBLEM if cuda.details["devices"] else Status.WARNING
        fix = "pip install --force-reinstall triton, in the version that torch requires"
        yield _failed("kernels here", error, fix, status)


def _failed(name: str, error: Exception, fix: str, status: Status = Status.PROBLEM) -> Check:
    first = (str(error).strip().splitlines() or [""])[0]
    return Check(name, status, f"fails: {type(error).__name__}: {first:.300}", fix)


def _cuda_check() -> Check:
    """Check the CUDA devices that torch sees."""
    import torch

    name = "cuda"
    details: dict[str, Any] = {"devices": []}
    if torch.version.cuda is None:
        return Check(name, Status.OK, "torch is built for a CPU", details=details)
    try:
        torch.cuda.init()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        found = f"torch sees no GPU: {first:.300}"
        # Without a driver there is nothing to see
        if not os.path.exists("/proc/driver/nvidia/version"):
            return Check(name, Status.OK, found, details=details)
        return Check(name, Status.PROBLEM, found, "see the lines driver and gpu", details)
    texts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor
        details["devices"].append(
            {
                "name": properties.name,
                "capability": capability,
                "sms": properties.multi_processor_count,
                "total_bytes": properties.total_memory,
            }
        )
        sms = properties.multi_processor_count
        texts.append(f"{properties.name} (sm_{capability}, {sms} SMs)")
    return Check(name, Status.OK, ", ".join(texts) or "no device", details=details)


def _kernel_checks(devices: list[dict[str, Any]]) -> Iterator[Check]:
    import torch

    # These import Triton
    from idefics2_engine.doctor.kernel_routes import kernel_routes, launch_configs, summary
    from idefics2_kernels.gpu.target import current_arch

    name = "kernels here"
    if devices:
        routes, arch = kernel_routes(), current_arch()
        details = {"arch": arch, "routes": routes, "launch_configs": launch_configs(arch)}
        yield Check(name, Status.OK, f"sm_{arch}: {summary(routes)}", details=details)
    else:
        found = "none compiled without a GPU; the next line is Triton's interpreter"
        yield Check(name, Status.OK, found, details={"arch": None, "routes": {}})
    device = torch.device("cuda" if devices else "cpu")
    try:
        yield _result_check(device)
    except Exception as error:
        # On a CPU the engine computes without kernels
        status = Status.PROBLEM if devices else Status.WARNING
        fix = "see the lines triton, ptxas and interpreter"
        yield _failed("kernel results", error, fix, status)


def _result_check(device: Any) -> Check:
    """Compare one small case of some operations with the reference, by the tests' criterion."""
    import torch

    from idefics2_kernels.catalog import CATALOG
    from idefics2_kernels.catalog.criterion import case_error

    torch.manual_seed(0)
    begin, shares = perf_counter(), {}
    for spec in CATALOG:
        if spec.name in _RUN:
            case = next(c for c in spec.cases if c.where == "any" and c.dtype is torch.bfloat16)
            inputs = spec.make_inputs(case, device)
            shares[spec.name] = case_error(spec, "triton", case, inputs)
    seconds = perf_counter() - begin
    worst = max(shares.values())
    found = (
        f"{', '.join(shares)} in bf16 on {device.type}: error {worst:.2f} of what is allowed, "
        f"{seconds:.1f} s"
    )
    # Infinity is no number of JSON
    details = {"share_of_allowed_error": {k: min(v, sys.float_info.max) for k, v in shares.items()}}
    if worst > 1:
        fix = "idefics2 bench kernels shows every case; do not trust answers of this machine"
        return Check("kernel results", Status.PROBLEM, found, fix, details)
    return Check("kernel results", Status.OK, found, details=details)
