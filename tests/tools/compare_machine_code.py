"""Compare the machine code of two commits, kernel by kernel, after a change of names and files.

    PYTHONPATH=kernels python tests/tools/compile_catalog.py 90 > before.jsonl
    PYTHONPATH=kernels python tests/tools/compile_catalog.py 90 > after.jsonl  # at the other commit
    python tests/tools/compare_machine_code.py before.jsonl after.jsonl

The exit code is 1 if a kernel's instructions differ for a case of the catalog, or if one file has a
kernel that the other lacks.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

Compiled = dict[tuple[int, str], list[str]]


def read(path: Path) -> Compiled:
    """Return the digests of all kernels for each architecture and case.

    They are in the order of compilation.
    """
    digests: Compiled = defaultdict(list)
    for line in path.read_text().splitlines():
        report = json.loads(line)
        digests[report["arch"], report["case"]].append(report["digest"])
    return digests


def main(before: str, after: str) -> int:
    """Print the differences and return the exit code."""
    old, new = read(Path(before)), read(Path(after))
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    for arch, case in different:
        print(f"sm_{arch} {case}: {old.get((arch, case))} became {new.get((arch, case))}")
    kernels = sum(map(len, new.values()))
    print(f"{kernels} kernels of {len(new)} cases, {len(different)} cases differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
