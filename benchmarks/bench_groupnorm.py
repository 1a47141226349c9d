"""GroupNorm + SiLU: GB/s of the least that must be moved, by shape, against PyTorch and NumPy.

    python benchmarks/bench_groupnorm.py [SHAPE ...]     (PyTorch's columns need torch: pip install -e '.[compare]')

The least: the forward reads x and writes y; the backward reads dy and x and writes dx.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Bench, run_op

from minidiff import no_grad, ops
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
    """On Tensors, tape and all."""
    leaves = [Tensor(a, requires_grad=True) for a in given[:3]]

    def forward() -> Any:
        with no_grad():
            return [ops.group_norm(*leaves, GROUPS, silu=True).data]

    def both() -> Any:
        for p in leaves:
            p.grad = None
        y = ops.group_norm(*leaves, GROUPS, silu=True)
        y.backward(given[3])
        return [y.data, *(p.grad for p in leaves)]

    return {"forward": forward, "forward + backward": both}


def torchs(case: Any, given: list[Any], way: str) -> Any:
    """Two functions, which torch.compile joins."""
    import torch

    memory = torch.channels_last if way == "channels last" else torch.contiguous_format
    x, dy = (given[i].permute(0, 3, 1, 2).contiguous(memory_format=memory) for i in (0, 3))
    leaves = [t.requires_grad_() for t in (x, given[1], given[2])]

    def norm(x: Any, gamma: Any, beta: Any) -> Any:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, gamma, beta))

    called = torch.compile(norm) if way == "compiled" else norm

    def forward() -> Any:
        with torch.inference_mode():
            return [called(*leaves)]

    def both() -> Any:
        y = called(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    return {"forward": forward, "forward + backward": both}


def to_numpy(case: Any, results: list[Any]) -> list[np.ndarray]:
    """y, dx, dgamma, dbeta in our layout."""
    return [r.detach().permute(0, 2, 3, 1).numpy() if r.ndim == 4 else r.detach().numpy() for r in results]


if __name__ == "__main__":
    run_op(Bench("groupnorm", "GB/s", CASES, work, arrays, ours, torchs, to_numpy))
