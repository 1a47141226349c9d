"""The optimizer's whole step: gradient norm and clip, AdamW, moving average: GB/s, against PyTorch and NumPy.

    python benchmarks/bench_adamw.py     (PyTorch's columns need torch: pip install -e '.[compare]')

The least that must be moved: the norm reads the gradients; the update reads them with the parameters, both moments and
the average, and writes the last four.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Bench, run_op

from minidiff.models import UNet, UNetConfig
from minidiff.optim import AdamW, clip_factor, gradient_norm
from minidiff.tensor import Tensor

UNETS = {
    "the demo's": UNetConfig(
        in_channels=48, out_channels=48, channels=(48, 64), blocks=1, heads=(4, 4), text_width=64, norm_groups=8,
        attention=("none", "cross"), transformer_layers=(1, 1),
    ),
    "conditional 10 M": UNetConfig(),
    "DDPM 35.7 M": UNetConfig(
        channels=(128, 256, 256, 256), attention=("none", "self", "none", "none"), mid_attention="self",
        heads=(1, 1, 1, 1), transformer_layers=(1, 1, 1, 1),
    ),
}  # fmt: skip
CASES = {name: [p.wanted_shape for p in UNet(config, seed=None).parameters()] for name, config in UNETS.items()}
LR, CLIP = 1e-3, 1.0
EMA_DECAY = 0.15  # below the warm-up of our average, (1 + step) / (10 + step), so that it does not come in


def work(case: Any, what: str) -> tuple[float, float]:
    """About 20 operations a parameter, and 10 numbers moved."""
    n = sum(float(np.prod(shape)) for shape in case)
    return 20 * n, 40 * n


def arrays(case: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """Parameters, then gradients."""
    return [rng.standard_normal(shape) for _ in range(2) for shape in case]


def ours(case: Any, given: list[np.ndarray]) -> Any:
    """Results: parameters and average after the first step."""
    parameters = {str(i): Tensor(a.copy(), requires_grad=True) for i, a in enumerate(given[: len(case)])}
    grads = {str(i): a for i, a in enumerate(given[len(case) :])}
    optimizer = AdamW(parameters, ema_decay=EMA_DECAY)

    def step() -> Any:
        optimizer.step(LR, grads, clip_factor(gradient_norm(list(grads.values())), CLIP))
        return [*(p.data for p in parameters.values()), *optimizer.ema.values()]

    return {"step": step}


def torchs(case: Any, given: list[Any], way: str) -> Any:
    """Fused AdamW, clip_grad_norm_, a lerp of all for the average. Clipping changes the gradients once."""
    import torch

    parameters = [torch.nn.Parameter(a) for a in given[: len(case)]]
    average = [p.detach().clone() for p in parameters]
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LR, betas=(0.9, 0.99), eps=1e-8, fused=True)
    for p, g in zip(parameters, given[len(case) :], strict=True):
        p.grad = g

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - EMA_DECAY)

    called = torch.compile(update) if way == "compiled" else update

    def step() -> Any:
        called()
        return [*parameters, *average]

    return {"step": step}


def to_numpy(case: Any, results: list[Any]) -> list[np.ndarray]:
    """Parameters, then their average."""
    return [r.detach().numpy() for r in results]


if __name__ == "__main__":
    ways = ("contiguous", "compiled")
    run_op(Bench("adamw", "GB/s", CASES, work, arrays, ours, torchs, to_numpy, ways, ("step",)))
