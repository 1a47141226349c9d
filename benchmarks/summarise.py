"""The op benchmarks in one table: results/summary-DEVICE.md, which the README shows.

python benchmarks/summarise.py      (after the bench_*.py that it reads)
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from common import results_path

OPS = {
    "conv2d": "convolution", "linear": "linear (+ activation)", "attention": "attention",
    "groupnorm": "GroupNorm + SiLU", "adamw": "clip + AdamW + average",
}  # fmt: skip


def line(name: str, what: str, rows: dict[str, Any]) -> str:
    """One row of the table."""
    ratios = {shape: row[what]["ratio"] for shape, row in rows.items() if "ratio" in row[what]}
    numpy = [row[what]["reference ratio"] for row in rows.values()]
    shares = [row[what]["share"] for row in rows.values()]
    lost = [f"{shape} ({r:.2f})" for shape, r in ratios.items() if r < 1]
    median, low, high = np.median(list(ratios.values())), min(ratios.values()), max(ratios.values())
    cells = [OPS[name], what, str(len(rows)), f"{median:.2f} ({low:.2f}-{high:.2f})", f"{np.median(numpy):.1f}"]
    return f"| {' | '.join(cells)} | {np.median(shares):.2f} | {'; '.join(lost) or 'none'} |"


def main() -> None:
    """Write the table."""
    names = [
        "op",
        "pass",
        "shapes",
        "PyTorch / ours: median (worst-best)",
        "NumPy / ours",
        "floor / time",
        "lost to PyTorch",
    ]
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for name in OPS:
        path = results_path(name, "json")
        if path.exists():
            rows = json.loads(path.read_text())["cases"]
            lines += [line(name, what, rows) for what in next(iter(rows.values()))]
    results_path("summary", "md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
