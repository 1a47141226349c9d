"""Linear layers, alone and with the activation behind them: GFLOP/s by shape, against PyTorch and NumPy.

python benchmarks/bench_linear.py [SHAPE ...]     (PyTorch's columns need torch: pip install -e '.[compare]')
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Bench, our_passes, run_op, torch_passes

from minidiff import ops
from minidiff.tensor import Tensor

SHAPES = [  # rows, inputs, outputs, activation
    (8192, 128, 128, None), (8192, 128, 1024, "geglu"), (8192, 512, 128, None), (2048, 128, 128, None),
    (512, 48, 64, None), (4096, 320, 320, None), (4096, 320, 2560, "geglu"), (4096, 1280, 320, None),
    (1024, 640, 5120, "geglu"), (256, 1280, 10240, "geglu"), (77, 768, 3072, "gelu"), (77, 768, 320, None),
    (32, 256, 1024, "silu"), (2, 1280, 1280, None),
]  # fmt: skip
OURS = {"gelu": "gelu_exact"}  # names that are not PyTorch's
CASES = {f"{M}, {K} -> {N}" + (f", {a}" if a else ""): (M, K, N, a) for M, K, N, a in SHAPES}


def work(case: Any, what: str) -> tuple[float, float]:
    """Operations of the products, and bytes if every array is moved once."""
    M, K, N, activation = case
    y = M * N / (2 if activation == "geglu" else 1)
    flops, moved = 2.0 * M * K * N, 4.0 * (M * K + K * N + y)
    return (flops, moved) if what == "forward" else (3 * flops, 3 * moved)


def arrays(case: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """x, w, b, dy."""
    M, K, N, activation = case
    shapes = [(M, K), (K, N), (N,), (M, N // 2 if activation == "geglu" else N)]
    return [rng.standard_normal(s) / (K**0.5 if i == 1 else 1) for i, s in enumerate(shapes)]


def ours(case: Any, given: list[np.ndarray]) -> Any:
    """On Tensors."""
    activation = OURS.get(case[3], case[3])
    leaves = [Tensor(a, True) for a in given[:3]]
    return our_passes(lambda *xwb: ops.linear(*xwb, activation=activation), leaves, given[3])


def torchs(case: Any, given: list[Any], way: str) -> Any:
    """The weight as PyTorch keeps it, (outputs, inputs)."""
    import torch

    F, activation = torch.nn.functional, case[3]

    def layer(x: Any, w: Any, b: Any) -> Any:
        y = F.linear(x, w, b)
        if activation == "geglu":
            a, g = y.chunk(2, dim=-1)
            return a * F.gelu(g)
        return y if activation is None else getattr(F, activation)(y)

    return torch_passes(layer, [given[0], given[1].T.contiguous(), given[2]], given[3], way)


def to_numpy(case: Any, results: list[Any]) -> list[np.ndarray]:
    """y, dx, dw, db."""
    return [(r.T if i == 2 else r).detach().numpy() for i, r in enumerate(results)]


if __name__ == "__main__":
    ways = ("contiguous", "compiled")
    run_op(Bench("linear", "GFLOP/s", CASES, work, arrays, ours, torchs, to_numpy, ways))
