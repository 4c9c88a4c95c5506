"""Tests of the order of packages: allowed imports, and modules that must not import torch."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import idefics2_engine
from paths import ROOT

# The layers from the bottom to the top. A package imports itself and packages on lines above its
# own. Packages on one line do not import each other.
ENGINE = """
errors
caller_errors charts field_checks model_files
json_file demo device report_page
images
model
agreement checkpoint prompts
structured
outputs sampling_params
row
scheduling
sampling
runtime
cpu_threads llm_options prefetcher progress_bar request_builder task_threads
submitter
llm
evaluation hf jobs doctor
parity
idefics2_bench
cli
__main__
"""
KERNELS = """
gpu
attention norms activation rotary patches apply_bitmask sample reference
matmul
nf4
lora_linear
ops variants
backward
gradients
differentiable
catalog
"""
# Of jobs, these packages stand on each other in this order
JOBS = ["store", "shadow", "writers", "readers", "plan"]
# The specification knows one file of the kernels: the format of a weight
EXCEPTIONS = {("reference", "idefics2_kernels.nf4.nf4_weight")}
# These import torch only inside a function, where it is loaded anyway
INSIDE = {("images", "torch")}

NO_TORCH = [
    "idefics2_engine",
    "idefics2_engine.errors",
    "idefics2_engine.field_checks",
    "idefics2_engine.caller_errors",
    "idefics2_engine.model_files",
    "idefics2_engine.agreement.token_agreement",
    "idefics2_engine.json_file",
    "idefics2_engine.demo",
    "idefics2_engine.report_page",
    "idefics2_engine.cpu_threads",
    "idefics2_engine.outputs",
    "idefics2_engine.parity",
    "idefics2_engine.parity.paths",
    "idefics2_engine.row",
    "idefics2_engine.sampling_params",
    "idefics2_engine.request_builder",
    "idefics2_engine.runtime.config",
    "idefics2_engine.sampling.generation_config",
    "idefics2_engine.model.config",
    "idefics2_engine.model.quantization",
    "idefics2_engine.checkpoint.hub",
    "idefics2_engine.checkpoint.shards",
    "idefics2_engine.checkpoint.safetensors_header",
    "idefics2_engine.checkpoint.checksums",
    "idefics2_engine.checkpoint.lora_config",
    "idefics2_engine.checkpoint.tensor_mapping",
    "idefics2_engine.doctor.examination",
    "idefics2_engine.doctor.report",
    "idefics2_bench.results.compare",
    "idefics2_bench.results.page",
    "idefics2_bench.steps.parts",
]
NO_TORCH_WHOLE = ["charts", "images", "jobs", "prompts", "scheduling", "structured"]
# These need a package that is not in the environment of development
NEEDS = {
    "idefics2_engine.evaluation.lm_eval_model": "lm_eval",
    "idefics2_engine.evaluation.lmms_eval_manifest": "lmms_eval",
    "idefics2_engine.evaluation.lmms_eval_model": "lmms_eval",
}
PACKAGES = {
    "idefics2_engine": ROOT / "engine/idefics2_engine",
    "idefics2_kernels": ROOT / "kernels/idefics2_kernels",
    "idefics2_bench": ROOT / "bench/idefics2_bench",
}


def module_name(file: Path) -> str:
    root = next(root for root in PACKAGES.values() if file.is_relative_to(root))
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Yield every module that ``file`` imports, at any level of the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str, package: str) -> str:
    """Return the direct child of ``package`` that is or contains ``module``."""
    if package == "idefics2_engine" and module.startswith("idefics2_bench"):
        return "idefics2_bench"
    name = module.removeprefix(f"{package}.").partition(".")[0]
    if package == "idefics2_engine" and name in idefics2_engine.__all__ and name != "__version__":
        # A name that the root re-exports belongs to the layer of its own module
        home: str = getattr(idefics2_engine, name).__module__
        return layer(home, package)
    return name


def upward(package: str, order: str) -> list[str]:
    """Return the imports that go upward or sideways in ``order``."""
    levels = {name: i for i, line in enumerate(order.split("\n")) for name in line.split()}
    wrong = []
    known = {package, "idefics2_bench"} if package == "idefics2_engine" else {package}
    files = [file for name in known for file in PACKAGES[name].rglob("*.py")]
    for file in files:
        own = layer(module_name(file), package)
        if own == package or file == PACKAGES[package] / "__init__.py":
            continue
        for name in imports(file):
            if (
                name.partition(".")[0] not in known
                or (own, ".".join(name.split(".")[:3])) in EXCEPTIONS
            ):
                continue
            other = layer(name, package)
            if other == package or other.startswith("__version__"):
                continue
            if other != own and levels[other] >= levels[own]:
                wrong.append(f"{module_name(file)} imports {name}")
    return wrong


@pytest.mark.parametrize(
    ("package", "order"), [("idefics2_engine", ENGINE), ("idefics2_kernels", KERNELS)]
)
def test_imports_point_downward(package: str, order: str) -> None:
    assert upward(package, order) == []


@pytest.mark.parametrize(
    ("package", "order"), [("idefics2_engine", ENGINE), ("idefics2_kernels", KERNELS)]
)
def test_every_module_has_a_layer(package: str, order: str) -> None:
    names = {
        path.stem
        for path in PACKAGES[package].iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names - {"__init__"} == set(order.split()) - {"idefics2_bench"}


def test_packages_of_jobs_import_downward() -> None:
    for level, package in enumerate(JOBS):
        above = tuple(f"idefics2_engine.jobs.{name}." for name in JOBS[level + 1 :])
        for file in (PACKAGES["idefics2_engine"] / "jobs" / package).rglob("*.py"):
            assert not [name for name in imports(file) if above and name.startswith(above)], file


def test_upward_import_is_found() -> None:
    turned = "\n".join(reversed(KERNELS.split("\n")))
    assert any(
        "imports idefics2_kernels.gpu" in wrong for wrong in upward("idefics2_kernels", turned)
    )


def test_kernels_import_neither_engine_nor_bench() -> None:
    for file in PACKAGES["idefics2_kernels"].rglob("*.py"):
        assert not [
            name for name in imports(file) if name.startswith(("idefics2_engine", "idefics2_bench"))
        ], file


def test_reference_does_not_import_triton() -> None:
    for file in (PACKAGES["idefics2_kernels"] / "reference").rglob("*.py"):
        assert "triton" not in [name.partition(".")[0] for name in imports(file)], file


def test_import_roots_are_not_packages() -> None:
    # With an __init__.py, `engine` and `kernels` would be packages if the checkout is on the path,
    # and `kernels` would hide Hugging Face's package of that name from transformers.
    for root in ("engine", "kernels", "bench", "tests/engine", "tests/kernels"):
        assert (ROOT / root).is_dir()
        assert not (ROOT / root / "__init__.py").exists()


def no_torch_modules() -> list[str]:
    whole = [
        module_name(file)
        for package in NO_TORCH_WHOLE
        for file in sorted((PACKAGES["idefics2_engine"] / package).rglob("*.py"))
    ]
    return NO_TORCH + whole


def test_modules_without_torch_exist() -> None:
    for name in no_torch_modules():
        assert importlib.util.find_spec(name) is not None, name


def test_modules_without_torch_do_not_import_it() -> None:
    """One process imports the modules in turn and reports after which one torch is loaded."""
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if {'torch', 'triton'} & sys.modules.keys():\n"
        "        sys.exit(f'{name} imports torch or Triton')\n"
    )
    command = [sys.executable, "-c", check, *no_torch_modules()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_without_a_gpu(package: str) -> None:
    for file in sorted(PACKAGES[package].rglob("*.py")):
        name = module_name(file)
        if name not in NEEDS or importlib.util.find_spec(NEEDS[name]):
            importlib.import_module(name)


def test_nothing_imports_what_a_harness_needs() -> None:
    importers = [
        module_name(file)
        for root in PACKAGES.values()
        for file in root.rglob("*.py")
        for name in imports(file)
        if any(name == one or name.startswith(f"{one}.") for one in NEEDS)
    ]
    assert importers == []
