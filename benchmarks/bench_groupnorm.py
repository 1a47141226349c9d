"""GroupNorm + SiLU: GB/s of the least that must be moved, by shape, against PyTorch and NumPy.

    python benchmarks/bench_groupnorm.py [SHAPE ...]     (PyTorch's columns need torch: pip install -e '.[compare]')

The least: the forward reads x and writes y; the backward reads dy and x and writes dx.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Bench, in_layout, our_passes, run_op, torch_passes

from minidiff import ops
from minidiff.tensor import Tensor

SHAPES = [
    (32, 32, 32, 64), (32, 16, 16, 128), (32, 8, 8, 128), (32, 32, 32, 192), (16, 32, 32, 128), (16, 16, 16, 256),
    (16, 4, 4, 512), (1, 64, 64, 320), (2, 64, 64, 320), (2, 16, 16, 1280), (2, 8, 8, 2560),
]  # fmt: skip
CASES = {f"{B}x {H}x{W}, {C}": (B, H, W, C) for B, H, W, C in SHAPES}
GROUPS = 32


def work(case: Any, what: str) -> tuple[float, float]:
    """About 12 operations a number forward (an exponential counted as 6), and bytes if every array is moved once."""
    n = float(np.prod(case))
    return (12 * n, 8 * n) if what == "forward" else (36 * n, 20 * n)


def arrays(case: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """x, gamma, beta, dy."""
    C = case[-1]
    return [
        rng.standard_normal(case) * 2 + 1,
        rng.standard_normal(C),
        rng.standard_normal(C),
        rng.standard_normal(case),
    ]


def ours(case: Any, given: list[np.ndarray]) -> Any:
    """On Tensors."""
    leaves = [Tensor(a, True) for a in given[:3]]
    return our_passes(lambda *xgb: ops.group_norm(*xgb, GROUPS, silu=True), leaves, given[3])


def torchs(case: Any, given: list[Any], way: str) -> Any:
    """Two functions, which torch.compile joins."""
    import torch

    def norm(x: Any, gamma: Any, beta: Any) -> Any:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, gamma, beta))

    return torch_passes(norm, [in_layout(given[0], way), *given[1:3]], in_layout(given[3], way), way)


def to_numpy(case: Any, results: list[Any]) -> list[np.ndarray]:
    """y, dx, dgamma, dbeta in our layout."""
    return [r.detach().permute(0, 2, 3, 1).numpy() if r.ndim == 4 else r.detach().numpy() for r in results]


if __name__ == "__main__":
    run_op(Bench("groupnorm", "GB/s", CASES, work, arrays, ours, torchs, to_numpy))
