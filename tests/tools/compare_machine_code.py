"""Compare the machine code of two commits, kernel by kernel: what a change of names and files must not change.

    PYTHONPATH=kernels python tests/tools/compile_catalog.py 90 > before.jsonl    # at one commit, then at the other
    python tests/tools/compare_machine_code.py before.jsonl after.jsonl

Exits with 1 if a kernel's instructions differ for a case of the catalog, or if either has a kernel that the other lacks.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

Compiled = dict[tuple[int, str], list[str]]


def read(path: Path) -> Compiled:
    """Return the digests of all kernels of each architecture and case, in the order in which they were compiled."""
    digests: Compiled = defaultdict(list)
    for line in path.read_text().splitlines():
        report = json.loads(line)
        digests[report["arch"], report["case"]].append(report["digest"])
    return digests


def main(before: str, after: str) -> int:
    """Print what differs and return the exit code."""
    old, new = read(Path(before)), read(Path(after))
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    for arch, case in different:
        print(f"sm_{arch} {case}: {old.get((arch, case))} became {new.get((arch, case))}")
    kernels = sum(map(len, new.values()))
    print(f"{kernels} kernels of {len(new)} cases, {len(different)} cases differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
