"""Convolution: GFLOP/s (counted as the direct algorithm) by shape, against PyTorch and NumPy.

    python benchmarks/bench_conv2d.py [SHAPE ...]     (PyTorch's columns need torch: pip install -e '.[compare]')

The first twelve shapes are 3x3 convolutions of U-Nets; the others are what stands beside them: one by one, stride 2,
and few channels. A share above 1 is Winograd's: fewer multiplications than were counted.
`--ways` sets our own algorithms beside each other, as shares of the multiply-add ceiling.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
from common import (
    Bench,
    in_layout,
    in_turns,
    our_passes,
    results_path,
    run_op,
    timed,
    torch_passes,
    write_json,
)  # fmt: skip

from minidiff import ops
from minidiff.tensor import Tensor

SHAPES = [
    (32, 32, 32, 64, 64), (32, 16, 16, 128, 128), (32, 8, 8, 128, 128), (32, 8, 8, 256, 128),
    (16, 32, 32, 128, 128), (16, 16, 16, 256, 256), (16, 8, 8, 256, 256), (16, 4, 4, 512, 256),
    (1, 64, 64, 320, 320), (2, 32, 32, 640, 640), (2, 16, 16, 1280, 1280), (2, 8, 8, 1280, 1280),
]  # fmt: skip
OTHERS = [
    (32, 32, 32, 192, 64, 1, 1), (2, 32, 32, 1280, 640, 1, 1), (32, 32, 32, 64, 64, 3, 2), (2, 32, 32, 640, 640, 3, 2),
    (32, 32, 32, 3, 64, 3, 1), (32, 32, 32, 64, 3, 3, 1), (32, 8, 8, 48, 48, 3, 1),
]  # fmt: skip
KERNEL = {3: "3x3", 1: "1x1"}


def label(B: int, H: int, W: int, C: int, N: int, k: int = 3, stride: int = 1) -> str:
    """For instance "32x 32x32, 64 -> 64"."""
    special = (f", {KERNEL[k]}" if k != 3 else "") + (f", stride {stride}" if stride > 1 else "")
    return f"{B}x {H}x{W}, {C} -> {N}{special}"


CASES = {label(*shape): (*shape, 3, 1)[:7] for shape in SHAPES} | {label(*shape): shape for shape in OTHERS}


def work(case: Any, what: str) -> tuple[float, float]:
    """Operations of the direct algorithm, and bytes if every array is moved once."""
    B, H, W, C, N, k, s = case
    x, w, y = B * H * W * C, k * k * C * N, B * (H // s) * (W // s) * N
    flops = 2.0 * y * k * k * C
    return (flops, 4.0 * (x + w + y)) if what == "forward" else (3 * flops, 4.0 * (3 * x + 3 * w + 3 * y))


def arrays(case: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """x, w, b, dy."""
    B, H, W, C, N, k, s = case
    w = rng.standard_normal((k, k, C, N)) / (k * C**0.5)
    return [rng.standard_normal((B, H, W, C)), w, rng.standard_normal(N), rng.standard_normal((B, H // s, W // s, N))]


def ours(case: Any, given: list[np.ndarray]) -> Any:
    """On Tensors."""
    k, s = case[5:]
    return our_passes(lambda *xwb: ops.conv2d(*xwb, s, k // 2), [Tensor(a, True) for a in given[:3]], given[3])


def torchs(case: Any, given: list[Any], way: str) -> Any:
    """Images and kernels in the layout of this way."""
    import torch

    k, s = case[5:]
    x, dy = (in_layout(given[i], way) for i in (0, 3))
    w = in_layout(given[1].permute(3, 0, 1, 2), way)
    return torch_passes(lambda *xwb: torch.nn.functional.conv2d(*xwb, s, k // 2), [x, w, given[2]], dy, way)


def to_numpy(case: Any, results: list[Any]) -> list[np.ndarray]:
    """y, dx, dw, db in our layout."""
    orders = [(0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0), (0,)]
    return [r.detach().permute(order).numpy() for r, order in zip(results, orders, strict=False)]


def ways(samples: int = 9) -> None:
    """Our algorithms beside each other and the multiply-add ceiling, in turns, forward on the twelve shapes."""
    from minidiff import _cpu

    rows = {}
    for shape in SHAPES:
        case = CASES[label(*shape)]
        x, w, _, dy = (a.astype(np.float32) for a in arrays(case, np.random.default_rng(0)))
        y, sides = np.empty_like(dy), ((1, 1), (1, 1))
        prepared = np.empty(_cpu.conv2d_prepared_size(w, *x.shape[:3], 1, sides, 1), np.float32)
        _cpu.conv2d_prepare(prepared, w, *x.shape[:3], 1, sides, 1)

        def call(algorithm: int, ready: Any = None, x: Any = x, w: Any = w, y: Any = y, sides: Any = sides) -> None:
            _cpu.conv2d_forward(y, x, None, w, None, None, None, 1, sides, 1, False, ready, algorithm)

        calls = {
            "ceiling": partial(_cpu.peak, 2_000_000),
            "direct": partial(call, 0), "F(2x2)": partial(call, 2), "F(4x4)": partial(call, 4),
            "F(4x4), weights prepared": partial(call, 4, prepared),
        }  # fmt: skip
        for warm_up in calls.values():
            warm_up()
        seconds = in_turns({way: partial(timed, c, 3) for way, c in calls.items()}, samples)
        top = _cpu.peak(1) * 2_000_000 / seconds.pop("ceiling")["median"]
        share = {way: work(case, "forward")[0] / s["median"] / top for way, s in seconds.items()}
        rows[label(*shape)] = {"ceiling": top, "seconds": seconds, "share": share}
        print(label(*shape), {way: round(share, 2) for way, share in rows[label(*shape)]["share"].items()}, flush=True)
    write_json("conv2d_ways", {"command": "bench_conv2d.py --ways", "cases": rows})
    names = list(next(iter(rows.values()))["share"])
    lines = [f"| direct operations a second / ceiling | {' | '.join(names)} |", "|" + " --- |" * (1 + len(names))]
    for shape, row in rows.items():
        cells = [f"{row['share'][name]:.2f}" for name in names]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    results_path("conv2d_ways", "md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--ways"]:
        ways()
    else:
        run_op(Bench("conv2d", "GFLOP/s", CASES, work, arrays, ours, torchs, to_numpy))
