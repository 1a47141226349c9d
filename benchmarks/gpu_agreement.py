"""How far the emulator's results are from a GPU's: every rung of every ladder, on the small arrays of tests/rungs.py.

    python benchmarks/gpu_agreement.py

Writes results/DEVICE/agreement.md: the largest difference of a rung's results, as a share of their largest number, and
how many of them have the same bits.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
from bench_gpu import Gpu, results_folder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
rungs = importlib.import_module("rungs")


def main() -> None:
    machine = Gpu()
    cuda, emulated = (importlib.import_module(f"minidiff.{name}") for name in ("_cuda", "_emulated"))
    lines = ["| case | rung | largest difference | the same bits |", "| --- | --- | --- | --- |"]
    for case, rung in rungs.every_rung(cuda):
        for module in (cuda, emulated):
            rungs.standing_on(module, case, rung)
        pairs = list(zip(rungs.results(case, "cuda"), rungs.results(case, "emulated"), strict=True))
        worst = max(float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)) for a, b in pairs)
        same = sum(np.array_equal(a, b) for a, b in pairs)
        names = {r[min(rung, len(r)) - 1][0] for r in rungs.climbed(cuda, case).values()}
        lines.append(f"| {case} | {rung} {', '.join(sorted(names))} | {worst:.1e} | {same} of {len(pairs)} |")
        for module in (cuda, emulated):
            rungs.standing_on(module, case, 0)
    text = "\n".join(lines) + "\n"
    (results_folder(machine) / "agreement.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
