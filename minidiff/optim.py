"""AdamW, the moving average of the parameters, gradient clipping, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.backend import Array, array_module, kernel
from minidiff.nn import Parameter


def clip_factor(norm: float, limit: float) -> float:
    """What gradients are multiplied by so that their common norm is at most `limit`."""
    return min(1.0, limit / norm) if norm > 0 else 1.0


def gradient_norm(grads: Sequence[Array]) -> float:
    """The Euclidean norm of all gradients together, summed in float64."""
    return math.sqrt(sum(float((g * g).sum(dtype=np.float64)) for g in grads))


@kernel
def adamw_update(
    p: Array, g: Array, m: Array, v: Array, ema: Array,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int, ema_decay: float,
) -> None:  # fmt: skip
    """One step for one parameter, in place, step = 1, 2, ... Loshchilov and Hutter 2017, arXiv 1711.05101.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (mhat / (sqrt(vhat) + eps) + decay p),  mhat = m / (1 - beta1^step), vhat = v / (1 - beta2^step)
    ema <- ema + (1 - ema_decay) (p - ema)
    """
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    denominator = array_module(p).sqrt(v / (1 - beta2**step)) + eps
    p -= lr * (m / (1 - beta1**step) / denominator + decay * p)
    ema += (1 - ema_decay) * (p - ema)


class AdamW:
    """AdamW over named parameters, with an exponential moving average (EMA) of them beside it.

    Only matrices and kernels decay; biases, gains and other vectors do not. The EMA's decay warms up as
    (1 + step) / (10 + step), at most `ema_decay`, so that it does not remember the noise it began from.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
    ):
        self.parameters = parameters
        self.betas, self.eps, self.weight_decay, self.ema_decay = betas, eps, weight_decay, ema_decay
        self.m = {name: array_module(p.data).zeros_like(p.data) for name, p in parameters.items()}
        self.v = {name: array_module(p.data).zeros_like(p.data) for name, p in parameters.items()}
        self.ema = {name: p.data.copy() for name, p in parameters.items()}
        self.step_number = 0

    def step(self, lr: float, grads: dict[str, Array]) -> None:
        """Update every parameter and its average from its gradient."""
        self.step_number += 1
        n = self.step_number
        ema_decay = min(self.ema_decay, (1 + n) / (10 + n))
        for name, p in self.parameters.items():
            decay = self.weight_decay if p.ndim > 1 else 0.0
            adamw_update(
                p.data, grads[name], self.m[name], self.v[name], self.ema[name],
                lr, *self.betas, self.eps, decay, n, ema_decay,
            )  # fmt: skip


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.0) -> float:
    """At step 1..steps: rises linearly to the peak over `warmup` steps, then falls along half a cosine to `final`."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
