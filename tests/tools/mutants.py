"""Break every plain Triton kernel on purpose: each change in ``tests/mutations`` must fail an interpreter case.

    make mutants                                 # all of them
    python tests/tools/mutants.py rms_norm -j 2  # those of one file

A file there names the kernel file whose text it changes. ``kernels`` lists the rows of the catalog
that must fail. Gluon kernels, which are for Hopper GPUs, have no mutations.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "kernels" / "idefics2_kernels"
# Exit codes of a run. Any other code means that the mutation broke more than a number.
_GREEN, _RED = (0, 10)


@dataclass(frozen=True)
class Mutation:
    """One change of a kernel file's text."""

    # Its path in the package, without the suffix
    file: str
    name: str
    kernels: tuple[str, ...]
    old: str
    new: str

    def problem(self, package: Path = PACKAGE) -> str | None:
        """Return why it cannot be applied in ``package``, or ``None``."""
        count = (package / f"{self.file}.py").read_text(encoding="utf-8").count(self.old)
        if count == 1:
            return None
        return (
            f"tests/mutations/{self.file}.toml: {self.name!r}: its `old` must occur once in "
            f"{PACKAGE.name}/{self.file}.py, got {count}"
        )

    def apply(self, package: Path) -> None:
        """Change the copy in ``package``."""
        path = package / f"{self.file}.py"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def mutations(files: list[str] | None = None) -> list[Mutation]:
    """Read the mutations of ``files``, or of all."""
    found = []
    folder = TESTS / "mutations"
    for path in sorted(folder.rglob("*.toml")):
        if files and path.stem not in files:
            continue
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]:
            entry = {**entry, "kernels": tuple(entry["kernels"])}
            file = path.relative_to(folder).with_suffix("").as_posix()
            found.append(Mutation(file=file, **entry))
    return found


def verdict(mutation: Mutation | None, kernels: tuple[str, ...]) -> str:
    """Run the interpreter cases of ``kernels`` on a mutated copy; return the outcome."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            mutation.apply(package)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--run", folder, *kernels]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        return "killed by a crash"
    known = {_GREEN: "SURVIVED", _RED: "killed"}
    return known.get(done.returncode, f"BROKEN: {done.stderr.strip().splitlines()[-1:]}")


def run_cases(folder: str, kernels: list[str]) -> int:
    """Check the interpreter cases of ``kernels`` on the package in ``folder``."""
    sys.path[:0] = [folder, str(TESTS / "helpers")]
    import torch

    import idefics2_kernels
    from idefics2_kernels.catalog import rows
    from parity import check
    from quick_interpreter import make_quick

    make_quick()
    assert Path(idefics2_kernels.__file__).is_relative_to(folder)
    for spec, implementation, case in rows("any"):
        if spec.name in kernels:
            torch.manual_seed(0)
            try:
                check(spec, implementation, case, torch.device("cpu"))
            except AssertionError as error:
                print(f"{spec.name} {implementation} {case.name}: {error}", file=sys.stderr)
                return _RED
    return _GREEN


def main() -> int:
    """Try the mutations named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="kernel files, without suffix; all unless given")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="at once")
    parser.add_argument("--run", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        return run_cases(options.run, options.files)
    chosen = mutations(options.files)
    if not chosen:
        parser.error(f"no mutations for {' '.join(options.files)}")
    if problems := [text for one in chosen if (text := one.problem()) is not None]:
        print(*problems, sep="\n")
        return 1
    failures = 0
    touched = tuple(dict.fromkeys(kernel for one in chosen for kernel in one.kernels))
    if (unchanged := verdict(None, touched)) != "SURVIVED":
        print(f"without a mutation: {unchanged}, wanted green")
        return 1
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = pool.map(lambda one: verdict(one, one.kernels), chosen)
        for mutation, found in zip(chosen, verdicts, strict=True):
            failures += not found.startswith("killed")
            print(f"{mutation.file:30} {mutation.name:40} {found}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} mutations killed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
