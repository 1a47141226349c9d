"""Registers, shared memory and spills of every CUDA kernel, as ptxas told them when it was compiled.

    python setup.py build_ext && python benchmarks/registers.py [BUILD_FOLDER]

A spill (numbers for which registers did not suffice) is a warning, on stderr. Writes results/registers.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COMPILED = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    logs = sorted(folder.rglob("*-nvcc.o.log"))
    if not logs:
        sys.exit(f"registers.py: {folder} holds no log of nvcc; build with nvcc first: python setup.py build_ext")
    rows = [row for log in logs for row in kernels(log)]
    lines = [
        "| file | kernel | sm | registers | static shared bytes | spilled bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for file, kernel, sm, registers, shared, spilled in rows:
        lines.append(f"| {file} | `{kernel}` | {sm} | {registers} | {shared} | {spilled} |")
        if spilled:
            print(f"registers.py: warning: {kernel} ({file}) spills {spilled} bytes on sm_{sm}", file=sys.stderr)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "registers.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(rows)} kernels, {sum(bool(row[-1]) for row in rows)} with spills")


def kernels(log: Path) -> list[tuple[str, str, int, int, int, int]]:
    """File, kernel, architecture, registers, shared bytes and spilled bytes of each kernel in a log of ptxas."""
    found = []
    name, sm, spilled = "", 0, 0
    for line in log.read_text().splitlines():
        if match := COMPILED.search(line):
            name, sm, spilled = match[1], int(match[2]), 0
        elif match := SPILLS.search(line):
            spilled = int(match[2]) + int(match[3])
        elif name and (match := USED.search(line)):
            found.append([name, sm, int(match[1]), int(match[2] or 0), spilled])
            name = ""
    names = demangled([row[0] for row in found])
    file = log.name.removesuffix("-nvcc.o.log").removeprefix("cuda-") + ".cu"
    return [(file, plain, *row[1:]) for plain, row in zip(names, found, strict=True)]


def demangled(names: list[str]) -> list[str]:
    """C++ names as they are written, without arguments and namespaces."""
    if not names:
        return []
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [
        re.sub(r"\(anonymous namespace\)::|minidiff::cuda::|^void ", "", without_arguments(n))
        for n in text.splitlines()
    ]


def without_arguments(name: str) -> str:
    """What stands before the last pair of brackets: brackets before them belong to template arguments."""
    depth = 0
    for i in range(len(name) - 1, -1, -1):
        depth += (name[i] == ")") - (name[i] == "(")
        if depth == 0:
            return name[:i]
    return name


if __name__ == "__main__":
    main()
