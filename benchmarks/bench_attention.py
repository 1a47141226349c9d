"""Attention from projected queries, keys and values (B, L, heads * d): GFLOP/s by shape, against PyTorch and NumPy.

    python benchmarks/bench_attention.py [SHAPE ...]     (PyTorch's columns need torch: pip install -e '.[compare]')

The backward needs five products of the forward's size where the forward needs two; computing the weights again is ours
to pay and is not counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Bench, our_passes, run_op, torch_passes

from minidiff import ops
from minidiff.tensor import Tensor

SHAPES = [  # B, queries, keys, heads, size of a head
    (32, 256, 256, 4, 32), (32, 64, 64, 4, 32), (32, 256, 16, 4, 32), (16, 256, 256, 1, 256), (32, 16, 12, 4, 16),
    (1, 4096, 4096, 8, 40), (1, 4096, 77, 8, 40), (1, 1024, 1024, 8, 80), (2, 256, 256, 8, 160),
]  # fmt: skip
CASES = {f"{B}x {L} to {M}, {h} x {d}": (B, L, M, h, d) for B, L, M, h, d in SHAPES}


def work(case: Any, what: str) -> tuple[float, float]:
    """Operations of the products, and bytes if every array is moved once."""
    B, L, M, h, d = case
    flops, small = 4.0 * B * h * L * M * d, 4.0 * B * h * d * (2 * L + 2 * M)
    return (flops, small) if what == "forward" else (3.5 * flops, 3 * small)


def arrays(case: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """q, k, v, dy."""
    B, L, M, h, d = case
    return [rng.standard_normal((B, n, h * d)) for n in (L, M, M, L)]


def ours(case: Any, given: list[np.ndarray]) -> Any:
    """On Tensors."""
    return our_passes(lambda *qkv: ops.attention(*qkv, case[3]), [Tensor(a, True) for a in given[:3]], given[3])


def torchs(case: Any, given: list[Any], way: str) -> Any:
    """scaled_dot_product_attention, with the heads taken apart and joined as in diffusers."""
    import torch

    def attention(*qkv: Any) -> Any:
        apart = [t.unflatten(2, (case[3], -1)).transpose(1, 2) for t in qkv]
        return torch.nn.functional.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2)

    return torch_passes(attention, given[:3], given[3], way)


def to_numpy(case: Any, results: list[Any]) -> list[np.ndarray]:
    """y, dq, dk, dv."""
    return [r.detach().numpy() for r in results]


if __name__ == "__main__":
    ways = ("contiguous", "compiled")
    run_op(Bench("attention", "GFLOP/s", CASES, work, arrays, ours, torchs, to_numpy, ways))
